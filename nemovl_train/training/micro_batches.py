"""The packs of a step as micro-batches of megatron-core's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from data_pipelines.schema import Pack
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.telemetry import Telemetry

# isort: split
# The layout module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

# What megatron-core's schedule wants of a loss: the value, its token count (ignored here), numbers to hand back.
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


class StepDroppedError(Exception):
    """A step was given up between two of its micro-batches: all ranks were asked to stop. No weight has changed."""


def forward_backward(
    model: NemotronVL,
    packs: Sequence[Pack],
    scales: Sequence[float],
    layout: Layout,
    *,
    telemetry: Telemetry | None = None,
    between: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Run every pack as a micro-batch through megatron-core's schedule.

    A pack goes to the device when its turn comes: the tiles of a whole step would be gigabytes.

    Args:
        model: The model; gradients land in its DDP buffers.
        packs: This rank's packs of the step.
        scales: Factor on each pack's loss weights.
        layout: Owner of the process groups.
        telemetry: Hears of every pack's losses.
        between: Asked between two micro-batches, with one answer on all ranks; True drops the step.

    Returns:
        Sum of the scaled losses of this rank's tokens, float32 scalar on the device.

    Raises:
        StepDroppedError: `between` said so.
    """

    def batches() -> Iterator[PackBatch]:
        for number, (pack, scale) in enumerate(zip(packs, scales, strict=True)):
            if number and between():
                raise StepDroppedError
            yield PackBatch.from_pack(pack, layout).scaled(scale)

    def forward_step(iterator: Iterator[PackBatch], stage: NemotronVL) -> tuple[torch.Tensor, LossFunction]:
        batch = next(iterator)

        def weighted_sum(token_loss_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss = (token_loss_L * batch.loss_weight).sum()
            if telemetry is not None:
                telemetry.saw(batch, token_loss_L)
            return loss, torch.ones((), dtype=torch.int, device=loss.device), {"loss": loss.detach()}

        # megatron-core neither divides nor scales a loss that is a sum over tokens (`calculate_per_token_loss`).
        return stage(batch, weights_are_final=True), weighted_sum

    outputs = forward_backward_no_pipelining(
        forward_step_func=forward_step,
        data_iterator=batches(),
        model=[model],
        num_microbatches=len(packs),
        seq_length=len(layout.context_tokens(len(packs[0].input_ids))),
        micro_batch_size=1,
        forward_only=False,
        pg_collection=layout.language_groups,
    )
    return torch.stack([output["loss"] for output in outputs]).sum()
