"""DeepSpeed's ZeRO as an engine: the same model, packs, loss and update rule, other owners of state and gradients.

Where DeepSpeed differs from what a step here means:

* It averages over ranks and micro-batches. Loss weights already hold every divisor, so the loss is multiplied by the
  number of ranks and not divided by the number of micro-batches.
* Its collectives hang on module calls (stage 3) and on gradients (all stages), so ranks have to make equal calls:
  where others have more tiles, or anyone might have some, black ones go through the tower with zero weight.
* It has one dtype for all parameters. Those that stay float32 in a bfloat16 model are kept out of it
  (`deepspeed_float32.py`), and join the gradient norm and the decision to step.
* Stage 3 empties a weight when its module's call is over. Mamba mixers are gathered as one, since they hand the
  weight of their norm around; the head's weight is gathered for the whole language model, which reads it itself.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data_pipelines.schema import Pack
from nemovl_train.config.schema import EngineConfig, OptimConfig, RunConfig
from nemovl_train.exceptions import UserError
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.mixer import PackedMambaMixer
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.deepspeed_float32 import Float32Parameters
from nemovl_train.training.deepspeed_state import WholeWeights, ZeroState
from nemovl_train.training.micro_batches import StepDroppedError
from nemovl_train.training.telemetry import Telemetry

LARGEST_BUCKET = 200_000_000
"""Most elements that DeepSpeed reduces or gathers at a time."""

PERSISTENT_ELEMENTS = 100_000
"""With stage 3, parameters up to this size stay on every rank (DeepSpeed's default)."""


class DeepSpeedEngine:
    """ZeRO over all ranks, around a model that was built whole on each of them.

    Args:
        model: Model with its initial weights and its frozen parameters marked.
        layout: Owner of the process groups; tensor and context parallel sizes are 1.
        config: A validated config.

    Raises:
        UserError: The package is missing.
    """

    def __init__(self, model: NemotronVL, layout: Layout, config: RunConfig) -> None:
        assert layout.pack_ranks == 1, "the config check refuses other layouts"
        deepspeed = _import_deepspeed(layout.device)
        self.model, self.layout, self.optim = model, layout, config.optim
        self.stage = config.engine.zero_stage
        self.clip_grad = config.optim.clip_grad
        dtype = DTYPES[config.precision.params]
        names = {id(p): name for name, p in model.named_parameters()}
        self.weights = WholeWeights(model, layout)
        self.float32 = Float32Parameters(model, layout, config.optim, dtype)
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [PackedMambaMixer], raise_if_not_found=False)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(_groups(model, config.optim), **adam_options(config.optim)),
            config=_deepspeed_config(config, layout, model),
        )
        self.zero = self.engine.optimizer
        if _accumulates_on_gpu(config.engine):
            _move_gradients(self.zero, layout.device)
        self.state = ZeroState(self.zero, self.stage, names, layout)
        self._gather_head_with_its_model()
        self._reject = False
        self._largest_norm = self._norm = math.inf
        self._join_norms()
        if self.stage == 3 or any(p.requires_grad for p in _tower_and_projector(model)):
            model.blank_tiles = self._blank_tiles
        self._gradients_waiting = False

    def zero_grad(self) -> None:
        """Let DeepSpeed drop gradients that it holds, by its own way of skipping a step."""
        if self._gradients_waiting:
            self.engine.set_gradient_accumulation_boundary(True)  # a step that was dropped never came to its last pack
            self._reject = True
            self._step()
            self._reject = False

    def forward_backward(
        self,
        packs: Sequence[Pack],
        scales: Sequence[float],
        *,
        telemetry: Telemetry | None = None,
        between: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """See `Engine.forward_backward`. A pack goes to the device when its turn comes.

        DeepSpeed adds gradients up as they come, so what telemetry takes for this rank's own time has waiting in it.
        """
        total = torch.zeros((), device=self.layout.device)
        self._gradients_waiting = True
        for number, (pack, scale) in enumerate(zip(packs, scales, strict=True), start=1):
            if number > 1 and between():
                raise StepDroppedError
            self.engine.set_gradient_accumulation_boundary(number == len(packs))
            batch = PackBatch.from_pack(pack, self.layout).scaled(scale)
            token_loss_L = self.engine(batch)
            loss = (token_loss_L * batch.loss_weight).sum()
            if telemetry is not None:
                telemetry.saw(batch, token_loss_L)
            self.engine.backward(loss * self.layout.dp, scale_wrt_gas=False)
            total += loss.detach()
        if telemetry is not None:
            telemetry.ready()
        return total

    def step(self, lr: float, *, largest_norm: float = math.inf) -> float | None:
        """See `Engine.step`; DeepSpeed clips and skips by the norm that `_join_norms` gives it."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.float32.sum_gradients()
        self._largest_norm, self._norm = largest_norm, math.inf
        self._step()
        if self.zero.overflow:
            return self._norm
        norm = float(self.zero._global_grad_norm)
        self.state.steps += 1
        self.float32.step(lr, scale=min(1.0, self.clip_grad / (norm + 1e-6)))
        return norm

    def collect_weights(self) -> None:
        """DeepSpeed's step ends with the weights where they belong."""

    @contextmanager
    def whole_model(self) -> Iterator[NemotronVL]:
        """See `Engine.whole_model`. With stage 3 all weights are on every rank's device meanwhile, without hooks."""
        if self.stage < 3:
            yield self.model
            return
        from deepspeed import zero

        offload = self.zero.parameter_offload
        offload._remove_module_hooks()
        blank_tiles = self.model.blank_tiles
        try:
            with zero.GatheredParameters(list(self.model.parameters())):
                self.model.blank_tiles = None
                yield self.model
        finally:
            self.model.blank_tiles = blank_tiles
            offload.forward_hooks, offload.backward_hooks = [], []
            offload.setup_zero_stage3_hooks()
            self._gather_head_with_its_model()

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Master weights and moments of this rank, as they lie in memory."""
        return {"deepspeed": self.state.sharded(), "float32": self.float32.sharded(self.state.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `sharded_state_dict` described."""
        self.state.restore(state["deepspeed"])
        self.float32.restore(state["float32"], self.state.steps)

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        self.engine.destroy()

    def _step(self) -> None:
        self.engine.step()
        self.float32.zero_grad_if(self._reject or bool(self.zero.overflow))
        self._gradients_waiting = False

    def _join_norms(self) -> None:
        """Have DeepSpeed count the float32 parameters in its norm; an infinite one makes it skip the step.

        So does one that is too large. DeepSpeed forgets the norm of a step that it skips: `_norm` keeps it.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups

        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        own = getattr(self.zero, name)

        def rejected_or_joined(*_: Any, **__: Any) -> Any:
            groups = [torch.full((), math.inf, device=self.layout.device)]
            if not self._reject:  # a dropped step need not have all gradients that a norm is made of
                found = own()
                groups = [*found] if self.stage == 3 else [found]
                groups += [torch.full_like(groups[0], self.float32.norm())]
                self._norm = float(combine_grad_norm_groups(groups))
                if self._norm > self._largest_norm:
                    groups += [torch.full_like(groups[0], math.inf)]
            return groups if self.stage == 3 else combine_grad_norm_groups(groups)

        setattr(self.zero, name, rejected_or_joined)

    def _blank_tiles(self, tiles: int) -> int:
        """Blank tiles that bring this rank's calls of the tower to the largest number of any rank, one at least."""
        tower = self.model.vision_model
        assert tower is not None
        with torch.set_grad_enabled(any(p.requires_grad for p in tower.parameters())):  # as the model encodes them
            chunk = tower.tiles_per_chunk()
        calls = -(-tiles // chunk)
        most = torch.tensor([max(calls, 1)], device=self.layout.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        wanted = int(most.item())
        return 0 if calls == wanted else (wanted - 1) * chunk + 1 - tiles

    def _gather_head_with_its_model(self) -> None:
        language = self.model.language_model
        if self.stage < 3 or language is None:
            return
        from deepspeed import zero

        head = language.output_layer
        zero.register_external_parameter(language, head.weight)
        # The loss reads the weight and runs the head's hooks of its own accord (`collect_weights`): these would gather
        # the weight once more and wait for a call's end that never comes.
        for hooks in (head._forward_pre_hooks, head._forward_hooks):
            hooks.clear()


def adam_options(optim: OptimConfig) -> dict[str, Any]:
    """AdamW's numbers; one fused pass over each tensor, on a GPU and in host memory alike."""
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps, "fused": True}


def _groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """megatron-core's rule, as in `optimizer.py`: no decay of vectors and biases."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    still = {name for name, p in trained if p.dim() == 1 or name.endswith(".bias")}
    groups = [
        {"params": [p for name, p in trained if name not in still], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in trained if name in still], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _tower_and_projector(model: NemotronVL) -> Iterator[nn.Parameter]:
    for part in (model.vision_model, model.projector):
        if part is not None:
            yield from part.parameters()


def _deepspeed_config(config: RunConfig, layout: Layout, model: nn.Module) -> dict[str, Any]:
    bf16 = config.precision.params == "bf16"
    bucket = min(LARGEST_BUCKET, sum(p.numel() for p in model.parameters()))
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": -(-config.trainer.global_batch // layout.dp),
        "gradient_clipping": config.optim.clip_grad,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_config(config.engine, layout.device, bucket),
    }


def _zero_config(engine: EngineConfig, device: torch.device, bucket: int) -> dict[str, Any]:
    cuda = device.type == "cuda"
    options: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(bucket, LARGEST_BUCKET // 4),
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
    }
    if engine.offload_optimizer:
        # Pinned by `_move_gradients` where that comes after.
        options["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda and not _accumulates_on_gpu(engine)}
    if engine.offload_params:
        options["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return options


def _accumulates_on_gpu(engine: EngineConfig) -> bool:
    """With stage 3, and weights on the GPU, gradients add up there too: host memory is what is short then."""
    return engine.zero_stage == 3 and engine.offload_optimizer and not engine.offload_params


def _move_gradients(zero: Any, device: torch.device) -> None:
    """Have DeepSpeed add gradients up on the GPU; each goes to the host once a step, in the form that AdamW takes.

    Its own sums lie in host memory that nobody has written to yet, so that no page of it was ever taken. Pinned, they
    would have been, and rounded up to a power of two.
    """
    sums = torch.zeros_like(zero.grad_partitions_flat_buffer, device=device)
    places = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for number, place in places.items():
        places[number] = sums.narrow(0, place.storage_offset(), place.numel())
    zero.grad_partitions_flat_buffer = sums
    if device.type == "cuda":
        for flat in zero.fp32_partitioned_groups_flat:
            flat.grad = flat.grad.pin_memory()


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists, though it is given a placed model
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise UserError(
            f"engine.name=deepspeed needs a package that is not installed ({error.name}): "
            "pip install 'nemovl[deepspeed]', or set engine.name=megatron"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # An all-reduce in shared memory that it would compile first; gloo does it as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
