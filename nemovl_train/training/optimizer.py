"""Gradient buffers and optimizers of the two sides of the model, driven as one.

The language model lives on the TP x CP x DP grid, tower and projector are data-parallel over every rank. Each side
that trains gets megatron-core's DistributedDataParallel (gradient buffers and their reduction) and an AdamW of its
own; the gradient norm and the decision to step are joint. A side without trainable parameters has neither, so it
holds no gradient and no optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemovl_train.config.schema import OptimConfig, PartScales
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout

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
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class Side:
    """Parameters that share process groups: `language`, or `vision` (tower and projector)."""

    name: str
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection


class Optimizers:
    """Gradient reduction, clipping and AdamW over every side that trains.

    Args:
        model: Model whose frozen parameters already have `requires_grad=False`.
        layout: Owner of the process groups.
        optim: Optimizer options.
        params_dtype: Dtype of the weights.
    """

    def __init__(self, model: NemotronVL, layout: Layout, optim: OptimConfig, params_dtype: torch.dtype) -> None:
        self.optim = optim
        self.config = _optimizer_config(optim, params_dtype)
        self.sides: list[Side] = []
        for name, module, groups in _sides(model, layout):
            if any(p.requires_grad for p in module.parameters()):
                ddp = DistributedDataParallel(
                    model.config,
                    _ddp_config(optim, overlap=name == "language"),
                    module,
                    pg_collection=groups,
                )
                optimizer = get_megatron_optimizer(
                    self.config,
                    [ddp],
                    config_overrides=_parameter_groups(self.config, optim.lr_scale),
                    use_gloo_process_groups=False,
                    pg_collection=groups,
                )
                self.sides.append(Side(name, ddp, optimizer, groups))
        self.chained = ChainedOptimizer([side.optimizer for side in self.sides])

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
        for side in self.sides:
            finalize_model_grads([side.ddp], None, pg_collection=side.groups)

    def step(self, lr: float) -> float | None:
        """Clip jointly and update, or change nothing when the gradient norm is not finite.

        Args:
            lr: Learning rate of this update; `optim.lr_scale` says what each part makes of it.

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
        norm = float(self.chained.get_grad_norm())
        if not math.isfinite(norm):
            return norm
        for side in self.sides:
            clip_grad_by_total_norm_fp32(side.optimizer.get_parameters(), self.optim.clip_grad, norm)
        self.chained.step_with_ready_grads()
        return norm

    def collect_weights(self) -> None:
        """Wait for weights that would otherwise be collected by the next forward pass. Collective.

        Whoever reads weights without calling the model's modules (checkpoints, the head in evaluation) needs it first.
        """
        for side in self.sides:
            if side.ddp.ddp_config.overlap_param_gather:
                side.ddp.start_param_sync(force_sync=True)

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Optimizer state by side, reshardable to other TP, CP and DP sizes."""
        return {
            side.name: side.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(SHARDING))
            for side in self.sides
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `sharded_state_dict` described, after it was filled from disk."""
        for side in self.sides:
            side.optimizer.load_state_dict(state[side.name])

    def num_parameters(self) -> int:
        """Trainable parameters held by this rank."""
        return sum(p.numel() for side in self.sides for p in side.ddp.module.parameters() if p.requires_grad)


def _sides(model: NemotronVL, layout: Layout) -> Iterator[tuple[str, nn.Module, ProcessGroupCollection]]:
    if model.language_model is not None:
        yield "language", model.language_model, layout.language_groups
    visual = {name: getattr(model, name) for name in ("vision_model", "projector") if getattr(model, name) is not None}
    if visual:
        yield "vision", nn.ModuleDict(visual), layout.vision_groups


def _ddp_config(optim: OptimConfig, *, overlap: bool) -> DistributedDataParallelConfig:
    """Tower and projector never overlap: a rank, a micro-batch or a whole stage may have no images for them."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap and optim.overlap_grad_reduce,
        overlap_param_gather=overlap and optim.overlap_param_gather,
        use_distributed_optimizer=optim.distributed,
    )


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
    )
