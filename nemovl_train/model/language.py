"""The hybrid Mamba-2 / attention language model (Nemotron Nano 2, arXiv 2508.14444), on megatron-core's `HybridModel`.

Shape legend: S tokens in a pack, L of this context parallel rank, H hidden, V vocabulary rows.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemovl_train.config.schema import LanguageConfig
from nemovl_train.model.attention import ContextAttention
from nemovl_train.model.backend import Backend
from nemovl_train.model.loss import token_loss
from nemovl_train.model.mixer import PackedMambaMixer
from nemovl_train.model.packing import PackParams
from nemovl_train.model.recompute import squared_relu
from nemovl_train.parallel import cpu
from nemovl_train.parallel.layout import Layout

cpu.install_if_no_cuda()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules  # noqa: E402


def language_transformer_config(
    config: LanguageConfig, layout: Layout, params_dtype: torch.dtype, **options: Any
) -> TransformerConfig:
    """megatron-core's config of the language model.

    Args:
        config: Sizes.
        layout: Parallel sizes.
        params_dtype: dtype of weights and activations (A_log and D stay float32).
        options: Further `TransformerConfig` fields (recompute, FP8).
    """
    swiglu = config.activation == "swiglu"
    assert swiglu or config.activation == "squared_relu", f"unknown activation {config.activation}"
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_hidden_size,
        mamba_num_heads=config.mamba_num_heads,
        mamba_head_dim=config.mamba_head_dim,
        mamba_state_dim=config.mamba_state_dim,
        mamba_num_groups=config.mamba_num_groups,
        is_hybrid_model=True,
        activation_func=F.silu if swiglu else squared_relu,
        gated_linear_unit=swiglu,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        apply_rope_fusion=config.position == "rope" and layout.device.type == "cuda",
        **(COMMON_OPTIONS | options),
    )


COMMON_OPTIONS: dict[str, Any] = {
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # Values come from `init.py` or a checkpoint.
    "perform_initialization": False,
    # Gradients are summed, not averaged, over data parallel ranks: the loss weights hold every divisor.
    "calculate_per_token_loss": True,
    # Compiled or apex kernels; none exists on a CPU.
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "cuda_graph_modules": [],
    # A sum over ranks gives the rank's part in memory of its own; there is nothing to free by copying it.
    "clone_scatter_output_in_embedding": False,
}
"""Fields of `TransformerConfig` that every language model here shares."""


class PackedHybridStack(HybridStack):
    """`HybridStack` with the backend's final norm; the parent's is always Transformer Engine's."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, final_norm: Any, **kwargs: Any):
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def hybrid_stack_spec(backend: Backend, config: LanguageConfig, layout: Layout) -> ModuleSpec:
    """The three kinds of layer, each a pre-norm residual block, from a backend's leaf modules."""
    mixer = ModuleSpec(
        PackedMambaMixer,
        params={"d_conv": config.conv_kernel, "chunk_size": config.chunk_size, "context": layout.mamba_context},
        submodules=MambaMixerSubmodules(in_proj=backend.column_linear, out_proj=backend.row_linear),
    )
    attention = ModuleSpec(
        SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_linear,
            core_attention=partial(ContextAttention, backend.core_attention),
            linear_proj=backend.row_linear,
        ),
    )
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear),
    )
    return ModuleSpec(
        PackedHybridStack,
        params={"final_norm": backend.norm},
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                MambaLayer,
                submodules=MambaLayerSubmodules(norm=backend.norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
            ),
            attention_layer=ModuleSpec(
                TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=backend.norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            mlp_layer=ModuleSpec(
                MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=backend.norm, mlp=mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )


class LanguageModel(HybridModel):
    """`HybridModel` over packs, with embedding, stack and head usable one by one.

    The vision-language model replaces rows between `embed` and `hidden_states`; the loss takes hidden states so that
    logits exist only where there is a label.
    """

    def embed(self, input_ids: Tensor) -> Tensor:
        """[L] int64 of this rank's context -> [L, 1, H]; the rank's part of L with sequence parallelism."""
        return self.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)

    def hidden_states(self, embeddings: Tensor, pack: PackParams) -> Tensor:
        """Runs the stack and its final norm.

        Args:
            embeddings: What `embed` gave, rows replaced at will.
            pack: Boundaries of the pack.

        Returns:
            Like `embeddings`.
        """
        if self.position_embedding_type == "rope":
            pack.rotary = self.rotary_pos_emb(pack.max_seqlen_q, packed_seq=True)[pack.position_ids]
        return self.decoder(hidden_states=embeddings, attention_mask=None, packed_seq_params=pack)

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, 1, H] (or the rank's part) -> [L, V] float32, whole on every tensor parallel rank."""
        logits, _ = self.output_layer(hidden, runtime_gather_output=True)
        return logits.squeeze(1).float()

    def forward(
        self,
        input_ids: Tensor,
        pack: PackParams,
        labels: Tensor | None = None,
        embeddings: Tensor | None = None,
        supervised: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy [L] float32 where there are labels (zero elsewhere), or logits [L, V] without labels.

        Args:
            input_ids: [L] int64 of this rank's context.
            pack: Boundaries of the pack.
            labels: [L] int64, already shifted; -100 where there is no target.
            embeddings: In place of `embed(input_ids)`.
            supervised: [M] int64, positions of the labels, where they are known without asking the device.
            gradient: [L] float32, as in `token_loss`.
        """
        hidden = self.hidden_states(self.embed(input_ids) if embeddings is None else embeddings, pack)
        if labels is None:
            return self.logits(hidden)
        collect_weights(self.output_layer)
        return token_loss(hidden, self.output_layer, labels, supervised, gradient=gradient)


def collect_weights(module: torch.nn.Module) -> None:
    """Do what megatron-core does to a module's weights before a call, for one that is used without being called.

    With `overlap_param_gather` updated weights are collected by hooks that run when their module is called; the loss
    takes the head's weight without calling the head.
    """
    for number, hook in module._forward_pre_hooks.items():
        assert number not in module._forward_pre_hooks_with_kwargs, "megatron-core's hooks take module and input"
        hook(module, ())


def build_language_model(
    config: LanguageConfig, layout: Layout, *, params_dtype: torch.dtype, backend: Backend, **options: Any
) -> LanguageModel:
    """Builds the language model with uninitialised weights on this process's device.

    Args:
        config: Sizes.
        layout: Groups and parallel sizes.
        params_dtype: dtype of weights and activations.
        backend: Where leaf modules come from.
        options: Further `TransformerConfig` fields (recompute, FP8).
    """
    model = LanguageModel(
        config=language_transformer_config(config, layout, params_dtype, **options),
        hybrid_stack_spec=hybrid_stack_spec(backend, config, layout),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position,
        hybrid_layer_pattern=config.hybrid_pattern,
        position_embedding_type=config.position,
        rotary_base=int(config.rope_theta),
        pg_collection=layout.language_groups,
    )
    if config.position == "rope" and config.rope_scaling_factor != 1.0:
        # `HybridModel` has no argument for what megatron-core's own rotary embedding can do.
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, factor=config.rope_scaling_factor)
    return model
