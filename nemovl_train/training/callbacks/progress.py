"""What a person sees while a stage trains: a bar on a terminal, aligned lines elsewhere."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemovl_train.training.callbacks.base import Callback, Run
from nemovl_train.training.step import StepResult

log = logging.getLogger(__name__)


class ProgressLine(Callback):
    """Loss, learning rate, useful tokens a second and time left.

    Args:
        label: Name of the stage.
        every_steps: Steps between two lines when there is no terminal.
        bar: Draw a bar when standard error is a terminal.
    """

    def __init__(self, label: str, *, every_steps: int, bar: bool) -> None:
        self.label = label
        self.every_steps = every_steps
        console = Console(stderr=True)
        self.bar = _bar(console) if bar and console.is_terminal else None

    def on_start(self, trainer: Run) -> None:
        """Start the clock and draw the bar."""
        self.total = trainer.config.trainer.steps
        self.began, self.first_step = time.perf_counter(), trainer.state.step
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, completed=trainer.state.step, numbers="")

    def on_step(self, trainer: Run, result: StepResult, *, lr: float, data_seconds: float) -> None:
        """Update the bar, or print a line now and then."""
        step = trainer.state.step
        rate = result.tokens / (result.seconds + data_seconds)
        fill = result.tokens / result.capacity
        numbers = f"loss {result.loss:6.3f}  lr {lr:.1e}  {rate:7,.0f} tok/s  fill {fill:4.0%}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif step % self.every_steps == 0 or step == self.total:
            per_step = (time.perf_counter() - self.began) / (step - self.first_step)
            left = per_step * (self.total - step)
            log.info("%s  step %4d/%d  %s  %4.0f s left", self.label, step, self.total, numbers, left)

    def close(self) -> None:
        """Give the terminal back."""
        if self.bar is not None:
            self.bar.stop()


def _bar(console: Console) -> Progress:
    numbers = TextColumn("{task.fields[numbers]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), numbers)
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
