"""Side jobs of the train loop, one small class each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from nemovl_train.training.step import StepResult
    from nemovl_train.training.trainer import Trainer


class Callback:
    """Hooks that the trainer calls on rank 0, in this order. The default does nothing."""

    def on_start(self, trainer: Trainer) -> None:
        """The run is built and restored; no step has been taken."""

    def on_step(self, trainer: Trainer, result: StepResult, *, lr: float, data_seconds: float) -> None:
        """A step is done and `trainer.state` counts it."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """A checkpoint was published."""

    def on_end(self, trainer: Trainer) -> None:
        """The last step is done and saved."""

    def close(self) -> None:
        """The run ends, well or not: release files and terminals."""
