"""Side jobs of the train loop, one small class each."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from nemovl_train.config.schema import RunConfig
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.state import TrainState
from nemovl_train.training.step import StepResult
from nemovl_train.training.telemetry import StepNumbers, Telemetry


class Run(Protocol):
    """What callbacks see of a trainer.

    Attributes:
        config: The stage's config.
        layout: Groups and sizes of this run.
        telemetry: What is measured of steps, and on which hosts.
        state: Counters after the last step.
        numbers: Measurements of the last step; None before the first.
        step_keys: Samples of the last step that changed nothing, over all ranks.
    """

    config: RunConfig
    layout: Layout
    telemetry: Telemetry
    state: TrainState
    numbers: StepNumbers | None
    step_keys: tuple[str, ...]


class Callback:
    """Hooks that the trainer calls on rank 0, in this order. The default does nothing."""

    def on_start(self, trainer: Run) -> None:
        """The run is built and restored; no step has been taken."""

    def on_step(self, trainer: Run, result: StepResult, *, lr: float, data_seconds: float) -> None:
        """A step is done and `trainer.state` counts it."""

    def on_checkpoint(self, trainer: Run, folder: Path) -> None:
        """A checkpoint was published."""

    def on_end(self, trainer: Run) -> None:
        """The last step is done and saved."""

    def close(self) -> None:
        """The run ends, well or not: release files and terminals."""
