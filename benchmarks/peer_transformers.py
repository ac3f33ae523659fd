"""Transformers as a peer: `NemotronHForCausalLM` under FSDP2 with every layer checkpointed, given the packs of a case.

Weights are float32 and shared out over all ranks, computed with in bfloat16; gradients and both moments of torch's
fused AdamW are float32 too, which is `optim.states=fp32` here. The class knows no packs that it could reset its states
by, so that documents run alone or padded. Where they are not equally many, ranks run their last one again without
weight: FSDP2's collectives count calls. Initial weights are ours, converted as `nemovl convert` would.

Shape legend: n tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peer_stock import micro_batches
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from data_pipelines.schema import Pack
from nemovl_train.config.schema import LanguageConfig, ModelConfig, OptimConfig
from nemovl_train.convert.mapping import canonical_to_hf
from nemovl_train.model.loss import IGNORE
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout


class TransformersEngine:
    """The peer with its optimizer, as far as a training step asks for them.

    Args:
        ours: Model whose weights it starts from.
        config: Its sizes.
        layout: All ranks data parallel.
        case: Optimizer options, and what a micro-batch is.
        compute: Dtype of products.
    """

    def __init__(self, ours: NemotronVL, config: ModelConfig, layout: Layout, case: Any, compute: torch.dtype) -> None:
        assert (layout.tp, layout.cp) == (1, 1), "the Transformers peer is data parallel alone"
        assert case.form != "packed", "set form to alone or padded: the Transformers class knows no packs"
        assert case.optim.states == "fp32", "set optim.states=fp32: the Transformers peer keeps no others"
        self._form, self._layout, self._optim = case.form, layout, case.optim
        self.model = _native(config.language, layout.device)
        self.model.load_state_dict(_weights(ours, config))
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        mesh = dist.device_mesh.init_device_mesh(layout.device.type, (layout.world_size,))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self._adam = _adamw(self.model, case.optim)

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._adam.zero_grad(set_to_none=True)

    def forward_backward(self, packs: Sequence[Pack], scales: Sequence[float], **_: Any) -> Tensor:
        """Sum of this rank's scaled losses; gradients are added up over ranks after the last document."""
        rows = [
            (pack, scale, *row)
            for pack, scale in zip(packs, scales, strict=True)
            for row in micro_batches(pack, self._form)
        ]
        most = torch.tensor(len(rows), device=self._layout.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        pack, _scale, tokens, length = rows[-1]
        rows += [(pack, 0.0, tokens, length)] * (int(most) - len(rows))
        total = torch.zeros((), device=self._layout.device)
        for number, row in enumerate(rows):
            self.model.set_requires_gradient_sync(number == len(rows) - 1)
            loss = self._loss(*row)
            (loss * self._layout.world_size).backward()  # FSDP2 averages over ranks
            total += loss.detach()
        return total

    def step(self, lr: float, **_: Any) -> float:
        """Clip and update."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._optim.clip_grad)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _loss(self, pack: Pack, scale: float, tokens: slice, length: int) -> Tensor:
        padded = length - (tokens.stop - tokens.start)

        def row(values: Tensor, blank: float) -> Tensor:
            return torch.cat([values[tokens], values.new_full((padded,), blank)]).to(self._layout.device)

        logits = self.model(input_ids=row(pack.input_ids, 0)[None], use_cache=False).logits[0]
        losses = F.cross_entropy(logits.float(), row(pack.labels, IGNORE), reduction="none", ignore_index=IGNORE)
        return (losses * row(pack.loss_weight, 0.0) * scale).sum()


def _native(config: LanguageConfig, device: torch.device) -> Any:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    with torch.device("meta"):
        model = NemotronHForCausalLM(
            NemotronHConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                hybrid_override_pattern=config.hybrid_pattern,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_query_groups,
                head_dim=config.head_dim,
                intermediate_size=config.ffn_hidden_size,
                mamba_num_heads=config.mamba_num_heads,
                mamba_head_dim=config.mamba_head_dim,
                ssm_state_size=config.mamba_state_dim,
                n_groups=config.mamba_num_groups,
                conv_kernel=config.conv_kernel,
                chunk_size=config.chunk_size,
                layer_norm_epsilon=config.norm_eps,
                attn_implementation="sdpa",
            )
        )
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            # It would clamp dt from below, which the released code and megatron-core do not.
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model.to_empty(device=device)


def _weights(ours: NemotronVL, config: ModelConfig) -> dict[str, Tensor]:
    assert ours.language_model is not None
    canonical = {
        f"language_model.{name}": parameter.detach() for name, parameter in ours.language_model.named_parameters()
    }
    hub = canonical_to_hf(canonical, config, "language", constants={})
    return {name.replace("backbone.", "model.", 1): tensor.float() for name, tensor in hub.items()}


def _adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """No decay of vectors, as in the other programs."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
