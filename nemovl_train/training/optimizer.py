"""Gradient buffers and optimizers of the two sides of the model, driven as one.

The language model lives on the TP x CP x DP grid, tower and projector are data-parallel over every rank. Each side
that trains gets megatron-core's DistributedDataParallel (gradient buffers and their reduction) and an AdamW of its
own; the gradient norm and the decision to step are joint. A side without trainable parameters has neither, so it
holds no gradient and no optimizer state.
"""

from __future__ import annotations

import importlib.util
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data_pipelines.schema import Pack
from nemovl_train.checkpoint.sealed import ShardedModel
from nemovl_train.config.schema import OptimConfig, PartScales
from nemovl_train.exceptions import UserError
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.micro_batches import forward_backward
from nemovl_train.training.optimizer_offload import Resting
from nemovl_train.training.optimizer_state import load_state, sharded_state
from nemovl_train.training.telemetry import Telemetry

# isort: split
# The layout module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass
class Side:
    """Parameters that share process groups: `language`, or `vision` (tower and projector)."""

    name: str
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection


class Optimizers:
    """megatron-core's engine: gradient reduction, clipping and AdamW over every side that trains.

    The model's config gets the `no_sync_func` and `finalize_model_grads_func` that megatron-core's schedule calls.

    Args:
        model: Model whose frozen parameters already have `requires_grad=False`.
        layout: Owner of the process groups.
        optim: Optimizer options.
        params_dtype: Dtype of the weights.
        weights: What checkpoints hold of the model; all of it by default.
    """

    def __init__(
        self,
        model: NemotronVL,
        layout: Layout,
        optim: OptimConfig,
        params_dtype: torch.dtype,
        weights: ShardedModel | None = None,
    ) -> None:
        self.model, self.layout = model, layout
        self.weights: ShardedModel = model if weights is None else weights
        self.optim = optim
        self.config = _optimizer_config(optim, params_dtype)
        self.sides: list[Side] = []
        for name, module, groups in parts_of(model, layout):
            if any(p.requires_grad for p in module.parameters()):
                ddp = DistributedDataParallel(
                    model.config,
                    _ddp_config(optim, overlap=name == "language"),
                    module,
                    pg_collection=groups,
                )
                if optim.fuse_grad_accumulation:
                    _fuse_grad_accumulation(module)
                optimizer = get_megatron_optimizer(
                    self.config,
                    [ddp],
                    config_overrides=_parameter_groups(self.config, optim.lr_scale),
                    use_gloo_process_groups=False,
                    pg_collection=groups,
                )
                self.sides.append(Side(name, ddp, optimizer, groups))
        self.chained = ChainedOptimizer([side.optimizer for side in self.sides])
        inner = [one.optimizer for side in self.sides for one in _chain(side.optimizer) if one.optimizer is not None]
        self.resting = Resting(inner, model) if optim.offload else None
        self._telemetry: Telemetry | None = None
        self._attach()

    def _attach(self) -> None:
        """Tell the model's config what to call, without keeping this object alive.

        Autograd holds the hooks of megatron-core's DDP, and they hold the config, in C++ where Python's collector does
        not see a cycle: with a reference from there, model, buffers and optimizer would never be freed.
        """
        config, own = self.model.config, weakref.ref(self)
        config.no_sync_func = lambda: _alive(own).no_sync()
        config.finalize_model_grads_func = lambda *args, **kwargs: _alive(own).reduce_gradients(*args, **kwargs)

    def forward_backward(
        self,
        packs: Sequence[Pack],
        scales: Sequence[float],
        *,
        telemetry: Telemetry | None = None,
        between: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """Micro-batch by micro-batch; gradients land in the DDP buffers and are reduced after the last."""
        self._telemetry = telemetry
        if self.resting is not None:
            self.resting.rest()
        return forward_backward(self.model, packs, scales, self.layout, telemetry=telemetry, between=between)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate locally: gradients of all but the last micro-batch are not reduced."""
        with ExitStack() as stack:
            for side in self.sides:
                stack.enter_context(side.ddp.no_sync())
            yield

    def zero_grad(self) -> None:
        """Clear the gradient buffers of every side."""
        for side in self.sides:
            side.ddp.zero_grad_buffer()
        self.chained.zero_grad()

    def reduce_gradients(self, *_: Any, **__: Any) -> None:
        """Sum gradients over data parallel ranks on every side, images or not.

        The signature takes whatever megatron-core's schedule passes: its token count is ignored on purpose, since
        the loss weights were divided before the step (the count is an integer there and clamped to 1).
        """
        if self._telemetry is not None:
            self._telemetry.ready()
        for side in self.sides:
            finalize_model_grads([side.ddp], None, pg_collection=side.groups)

    def step(self, lr: float, *, largest_norm: float = math.inf) -> float | None:
        """Clip jointly and update, or change nothing when the gradient norm is not finite or too large.

        Args:
            lr: Learning rate of this update; `optim.lr_scale` says what each part makes of it.
            largest_norm: Above it nothing changes.

        Returns:
            Gradient norm before clipping, over all sides and ranks; None when nothing trains.
        """
        if not self.sides:
            return None
        for side in self.sides:
            for group in side.optimizer.param_groups:
                group["lr"] = lr * getattr(self.optim.lr_scale, side.name) * (group["max_lr"] / self.config.lr)
                group["weight_decay"] = self.optim.weight_decay * group.get("wd_mult", 1.0)
        self.chained.prepare_grads()
        norm = self._gradient_norm()
        if not math.isfinite(norm) or norm > largest_norm:
            return norm
        for side in self.sides:
            self._clip(side.optimizer.get_parameters(), norm)
        self._wake()
        self.chained.step_with_ready_grads()
        return norm

    def _wake(self) -> None:
        """Have optimizer state on the device."""
        if self.resting is not None:
            self.resting.wake()

    def _gradient_norm(self) -> float:
        """Norm over all sides and ranks. Collective.

        Gradients of bfloat16 weights are bfloat16 with lean states, those of what stays float32 are not, and the
        kernels behind megatron-core's norm and clipping read all tensors of a call as they read the first.
        """
        norms = [
            get_grad_norm_fp32([g for g in grads if g.dtype == dtype], grad_stats_parallel_group=group)
            for side in self.sides
            for optimizer in side.optimizer.chained_optimizers
            for grads, group in [(optimizer.get_grads_for_grad_norm(), optimizer.get_grad_stats_parallel_group())]
            for dtype in self._gradient_dtypes
        ]
        return math.hypot(*norms)

    def _clip(self, parameters: list[nn.Parameter], norm: float) -> None:
        """Scales gradients so that a total norm of `norm` becomes at most `optim.clip_grad`."""
        # Gradients of another dtype than their master weight's cannot be its `grad`.
        apart = self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        held = "decoupled_grad" if apart else "grad"
        for dtype in self._gradient_dtypes:
            chosen = [p for p in parameters if (g := getattr(p, held, None)) is not None and g.dtype == dtype]
            clip_grad_by_total_norm_fp32(chosen, self.optim.clip_grad, norm, use_decoupled_grad=apart)

    @property
    def _gradient_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of all gradients; the same on every rank, whatever it holds."""
        return (torch.float32, torch.bfloat16) if self.optim.states == "lean" else (torch.float32,)

    def collect_weights(self) -> None:
        """Wait for weights that would otherwise be collected by the next forward pass. Collective.

        Whoever reads weights without calling the model's modules (checkpoints, the head in evaluation) needs it first.
        """
        for side in self.sides:
            if side.ddp.ddp_config.overlap_param_gather:
                side.ddp.start_param_sync(force_sync=True)

    @contextmanager
    def whole_model(self) -> Iterator[NemotronVL]:
        """The model, which every rank holds whole (but for tensor parallelism). Collective."""
        self.collect_weights()
        if self.resting is not None:
            self.resting.rest()  # evaluation gets the room that a step's packs have
        try:
            yield self.model
        finally:
            self._wake()

    def close(self) -> None:
        """Nothing to give back: process groups belong to the layout."""

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Optimizer state by side, reshardable to other TP, CP and DP sizes."""
        self._wake()
        return {
            f"{side.name}.{number}": (
                sharded_state(inner, model_state, is_loading=is_loading)
                if isinstance(inner, DistributedOptimizer)
                else inner.sharded_state_dict(model_state, is_loading=is_loading)
            )
            for side in self.sides
            for number, inner in enumerate(_chain(side.optimizer))
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `sharded_state_dict` described, after it was filled from disk."""
        self._wake()
        for side in self.sides:
            for number, inner in enumerate(_chain(side.optimizer)):
                load = load_state if isinstance(inner, DistributedOptimizer) else type(inner).load_state_dict
                load(inner, state[f"{side.name}.{number}"])

    def num_parameters(self) -> int:
        """Trainable parameters held by this rank."""
        return sum(p.numel() for side in self.sides for p in side.ddp.module.parameters() if p.requires_grad)


def _alive(reference: weakref.ref[Optimizers]) -> Optimizers:
    found = reference()
    assert found is not None, "a model trains as long as somebody holds its optimizers"
    return found


def parts_of(model: NemotronVL, layout: Layout) -> Iterator[tuple[str, nn.Module, ProcessGroupCollection]]:
    """What the model consists of, by the groups that share it: name of the side, module, groups."""
    if model.language_model is not None:
        yield "language", model.language_model, layout.language_groups
    visual = {name: getattr(model, name) for name in ("vision_model", "projector") if getattr(model, name) is not None}
    if visual:
        yield "vision", nn.ModuleDict(visual), layout.vision_groups


def _chain(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core chains an optimizer of dense parameters with one of experts; without experts it is alone."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _ddp_config(optim: OptimConfig, *, overlap: bool) -> DistributedDataParallelConfig:
    """Tower and projector never overlap: a rank, a micro-batch or a whole stage may have no images for them."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=optim.states != "lean",
        overlap_grad_reduce=overlap and optim.overlap_grad_reduce,
        overlap_param_gather=overlap and optim.overlap_param_gather,
        use_distributed_optimizer=optim.distributed,
    )


def _fuse_grad_accumulation(module: nn.Module) -> None:
    """Lets Transformer Engine's linears add weight gradients to `main_grad`.

    Through megatron-core's config this would need apex for the output layer, which is not Transformer Engine's.
    """
    for part in module.modules():
        if hasattr(part, "fuse_wgrad_accumulation") and part.weight.requires_grad:
            part.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _parameter_groups(config: OptimizerConfig, scale: PartScales) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's rule (no decay of vectors), and groups of their own for two kinds of parameters.

    The projector's, where its learning rate is not that of its side, the tower's; and what stays float32 in a bf16
    model:

    megatron-core 0.19.2 moves a group's float32 parameters to its front but then looks each parameter's state up at its
    old place (`optimizer/distrib_optimizer.py`): in a mixed group a checkpoint would hold another parameter's moments.
    """
    groups = get_standard_config_overrides(config)
    if config.params_dtype != torch.float32:
        # An override is what makes a group; this one repeats the learning rate that every group gets anyway.
        groups[ParamKey(name=("*A_log", "*.D"))] = ParamGroupOverride(max_lr=config.lr)
    if scale.projector != scale.vision:
        groups[ParamKey(name="module.projector.*")] = ParamGroupOverride(
            max_lr=config.lr * scale.projector / scale.vision
        )
    return groups


def _optimizer_config(optim: OptimConfig, params_dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=optim.distributed,
        **_state_dtypes(optim.states),
    )


def _state_dtypes(states: str) -> dict[str, Any]:
    """Options of megatron-core's precision-aware optimizer, which is Transformer Engine's fused Adam.

    Raises:
        UserError: Transformer Engine is not there.
    """
    if states == "fp32":
        return {}
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"optim.states={states} needs Transformer Engine's fused Adam, which is not installed (pip install "
            "'nemovl[gpu]', on a CUDA machine); set optim.states=fp32"
        )
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        "main_grads_dtype": torch.bfloat16 if states == "lean" else torch.float32,
    }
