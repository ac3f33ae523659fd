"""What turns packs into updated weights: megatron-core (`optimizer.py`) or DeepSpeed (`deepspeed_engine.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from data_pipelines.schema import Pack
from nemovl_train.checkpoint.sealed import ShardedModel
from nemovl_train.config.schema import RunConfig
from nemovl_train.model.adapters import TrainedWeights
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.telemetry import Telemetry


class Engine(Protocol):
    """A model with its gradients and its AdamW. Every method is collective.

    Attributes:
        weights: The weights as a checkpoint saves and fills them; with adapters those that train alone.
    """

    @property
    def weights(self) -> ShardedModel:
        """See the class."""

    def zero_grad(self) -> None:
        """Forget gradients that no `step` took."""

    def forward_backward(
        self,
        packs: Sequence[Pack],
        scales: Sequence[float],
        *,
        telemetry: Telemetry | None = None,
        between: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """Sum gradients over packs and ranks.

        Args:
            packs: This rank's packs of the step, equally many on every rank.
            scales: Factor on each pack's loss weights; with it the sum over all ranks is the step's loss.
            telemetry: Hears of every pack's losses, and when this rank has done its part.
            between: Asked between two micro-batches, with one answer on all ranks; True drops the step.

        Returns:
            Sum of the scaled losses of this rank's tokens, float32 scalar on the device.

        Raises:
            StepDroppedError: `between` said so. `zero_grad` comes before the next step.
        """

    def step(self, lr: float, *, largest_norm: float = math.inf) -> float | None:
        """Clip and update, or change nothing when the gradient norm is not finite or too large.

        Args:
            lr: Learning rate of this update.
            largest_norm: Above it nothing changes.

        Returns:
            Gradient norm before clipping, over all ranks; None when nothing trains.
        """

    def collect_weights(self) -> None:
        """Finish updates that are still under way, before `weights` is read."""

    def whole_model(self) -> AbstractContextManager[NemotronVL]:
        """The model with all its weights on every rank, for work without gradients."""

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Optimizer state as a checkpoint saves it; shapes to fill with `is_loading`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `sharded_state_dict` described, after it was filled from disk."""

    def close(self) -> None:
        """Give back what outlives the object."""


def open_engine(model: NemotronVL, layout: Layout, config: RunConfig) -> Engine:
    """Put a model into the engine that the config names. Collective.

    Args:
        model: Model with its initial weights, frozen parameters already with `requires_grad=False`.
        layout: Owner of the process groups.
        config: A validated config.

    Raises:
        UserError: The engine cannot run here.
    """
    if config.engine.name == "deepspeed":
        # Only where it is asked for: the package is an extra.
        from nemovl_train.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, layout, config)
    weights = TrainedWeights(model) if config.adapter.rank else None
    return Optimizers(model, layout, config.optim, DTYPES[config.precision.params], weights)
