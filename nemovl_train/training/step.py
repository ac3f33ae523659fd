"""One optimizer step: divisor, forward and backward over the micro-batches, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_pipelines.schema import Pack
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.engine import Engine
from nemovl_train.training.telemetry import Telemetry


@dataclass(frozen=True)
class Limits:
    """What a step may bring; beyond it nothing changes.

    Attributes:
        loss: Largest loss.
        norm: Largest gradient norm.
    """

    loss: float = math.inf
    norm: float = math.inf


@dataclass(frozen=True)
class StepResult:
    """What one step did, already summed over data parallel ranks.

    Attributes:
        loss: Weighted mean cross entropy in nats, as optimised.
        grad_norm: Global gradient norm before clipping; None when nothing trains.
        applied: False when a value that is not finite, or beyond its limit, kept the step from changing anything.
        tokens: Tokens of real samples in the step.
        supervised: Tokens that carried loss.
        visual: Image tokens.
        capacity: Tokens the packs could have held.
        samples: Samples in the step.
        tiles: Image tiles encoded.
        seconds: Wall time of the step without waiting for data, on this rank.
    """

    loss: float
    grad_norm: float | None
    applied: bool
    tokens: int
    supervised: int
    visual: int
    capacity: int
    samples: int
    tiles: int
    seconds: float


def loss_scales(packs: Sequence[Pack], divisor: str, layout: Layout) -> list[float]:
    """Factor on each pack's loss weights so that the step's loss is their weighted mean.

    Weights are floats and the step's packs are known, so the division happens before the forward pass instead of
    inside megatron-core, whose token count is an integer.

    Args:
        packs: This data parallel rank's packs of the step.
        divisor: `global` divides by the weight sum of the step; `pack` gives every supervised pack the same weight.
        layout: Owner of the data parallel group.

    Returns:
        One factor per pack; 0 for a pack without supervised tokens.
    """
    sums = [float(pack.loss_weight.sum(dtype=torch.float64)) for pack in packs]
    total = torch.tensor([sum(sums), sum(s > 0 for s in sums)], dtype=torch.float64, device=layout.device)
    dist.all_reduce(total, group=layout.language_groups.dp)
    weight_sum, supervised_packs = total.tolist()
    if divisor == "global":
        return [1.0 / weight_sum if s > 0 else 0.0 for s in sums]
    return [1.0 / (s * supervised_packs) if s > 0 else 0.0 for s in sums]


def train_step(
    engine: Engine,
    packs: Sequence[Pack],
    layout: Layout,
    *,
    lr: float,
    divisor: str,
    telemetry: Telemetry | None = None,
    limits: Limits = Limits(),
    between: Callable[[], bool] = lambda: False,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step over this rank's packs.

    A loss or gradient norm that is not finite on any rank, or beyond its limit, leaves every parameter and moment on
    every rank as it was: tensor parallel ranks compute one loss together, all others add theirs up.

    Args:
        engine: The model with its gradients and its optimizer.
        packs: This rank's packs of the step.
        layout: Owner of the process groups.
        lr: Learning rate of the update.
        divisor: As in `loss_scales`.
        telemetry: Hears of every pack's losses.
        limits: Largest loss and gradient norm that are taken.
        between: As in `Engine.forward_backward`.
        before_update: Called when gradients are there and weights are still those that made them.

    Raises:
        StepDroppedError: `between` said so.
    """
    began = time.perf_counter()
    scales = loss_scales(packs, divisor, layout)
    engine.zero_grad()
    if telemetry is not None:
        telemetry.begin()
    loss = engine.forward_backward(packs, scales, telemetry=telemetry, between=between)
    counts = _reduce_counts(loss, packs, layout)
    before_update()
    wanted = math.isfinite(counts[0]) and counts[0] <= limits.loss
    grad_norm = engine.step(lr, largest_norm=limits.norm) if wanted else math.nan
    return StepResult(
        loss=counts[0],
        grad_norm=grad_norm,
        applied=wanted and (grad_norm is None or (math.isfinite(grad_norm) and grad_norm <= limits.norm)),
        tokens=int(counts[1]),
        supervised=int(counts[2]),
        visual=int(counts[3]),
        capacity=int(counts[4]),
        samples=int(counts[5]),
        tiles=int(counts[6]),
        seconds=time.perf_counter() - began,
    )


def _reduce_counts(loss: torch.Tensor, packs: Sequence[Pack], layout: Layout) -> list[float]:
    """Loss and token counts of the step in one all-reduce, so that a step has one host synchronisation here.

    Context parallel ranks each have a part of the loss, but all of them have the whole packs: one counts.
    """
    keys = ("tokens", "supervised_tokens", "visual_tokens")
    local = [float(sum(pack.stats[key] for pack in packs)) for key in keys]
    local += [float(sum(pack.input_ids.numel() for pack in packs)), float(sum(len(pack.sample_keys) for pack in packs))]
    local += [float(sum(pack.tiles.shape[0] for pack in packs))]
    total = torch.tensor([0.0, *local], dtype=torch.float64) * (layout.cp_rank == 0)
    total = total.to(layout.device)
    total[0] = loss.double()
    dist.all_reduce(total, group=layout.language_groups.dp_cp)
    return total.tolist()
