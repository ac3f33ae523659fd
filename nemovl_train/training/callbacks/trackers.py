"""Optional trackers. They mirror `metrics.jsonl`; a tracker that fails is dropped with a warning, the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemovl_train.exceptions import ConfigError
from nemovl_train.training.callbacks.base import Callback, Run
from nemovl_train.training.step import StepResult

log = logging.getLogger(__name__)


class Tracker(Callback):
    """Sends each step's numbers to one place.

    Args:
        name: Name in warnings.
        send: Takes the numbers and the step.
        finish: Flushes and closes.
    """

    def __init__(self, name: str, send: Callable[[dict[str, float], int], None], finish: Callable[[], None]) -> None:
        self.name, self.send, self.finish = name, send, finish
        self.alive = True

    def on_step(self, trainer: Run, result: StepResult, *, lr: float, data_seconds: float) -> None:
        """Send the step's numbers."""
        numbers = {
            "loss": result.loss,
            "lr": lr,
            "tokens_per_second": result.tokens / (result.seconds + data_seconds),
            "fill": result.tokens / result.capacity,
        }
        if result.grad_norm is not None:
            numbers["grad_norm"] = result.grad_norm
        if trainer.numbers is not None:
            numbers |= {f"loss/{name}": loss for name, loss in trainer.numbers.source_loss.items()}
            if trainer.numbers.mfu is not None:
                numbers["mfu"] = trainer.numbers.mfu
        self._guarded(lambda: self.send(numbers, trainer.state.step))

    def close(self) -> None:
        """Flush and close."""
        self._guarded(self.finish)

    def _guarded(self, action: Callable[[], None]) -> None:
        if not self.alive:
            return
        try:
            action()
        except Exception as error:
            # Whatever a tracker does, training continues.
            self.alive = False
            log.warning("%s stopped working and is left out from here on: %s", self.name, error)


def tensorboard(folder: Path) -> Tracker:
    """TensorBoard event files in the stage's folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(["logging.tensorboard=true needs it; type: pip install 'nemovl[tensorboard]'"]) from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker("TensorBoard", send, writer.close)


def wandb(folder: Path, *, name: str, config: dict[str, Any]) -> Tracker:
    """Weights & Biases, offline unless the environment says otherwise (WANDB_MODE)."""
    import os

    try:
        import wandb as library
    except ImportError as error:
        raise ConfigError(["logging.wandb=true needs wandb; type: pip install 'nemovl[wandb]'"]) from error
    mode = os.environ.get("WANDB_MODE", "offline")
    # The id is the run's name, so that a restart continues the same curve.
    identity = name.replace("/", "-")
    run = library.init(project="nemovl", name=name, id=identity, resume="allow", dir=folder, mode=mode, config=config)
    return Tracker("wandb", lambda numbers, step: run.log(numbers, step=step), run.finish)
