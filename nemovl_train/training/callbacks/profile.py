"""A profile of some steps of a run: `profile/trace.json.gz`, `summary.json` and one page, `summary.txt`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from nemovl_train.checkpoint.files import explain_disk_errors
from nemovl_train.training.callbacks.base import Callback, Run
from nemovl_train.training.profiling import Recording, page, summary

if TYPE_CHECKING:
    from nemovl_train.config.schema import ProfileConfig
    from nemovl_train.training.step import StepResult

log = logging.getLogger(__name__)


class Profile(Callback):
    """Profiles the first rank from the end of one step to the end of a later one: fetching of packs and side jobs too.

    Args:
        folder: The stage's folder.
        options: Which steps.
    """

    def __init__(self, folder: Path, options: ProfileConfig) -> None:
        self._folder, self._options = folder / "profile", options
        self._taken, self._first = 0, 0
        self._recording: Recording | None = None

    def on_step(self, trainer: Run, result: StepResult, *, lr: float, data_seconds: float) -> None:
        """Begin or end."""
        self._taken += 1
        if self._taken == self._options.after:
            self._first = trainer.state.step + 1
            self._recording = Recording()
        elif self._taken == self._options.after + self._options.steps:
            self._write(trainer)

    def close(self) -> None:
        """A run that ends before the last of the steps leaves no profile."""
        if self._recording is not None:
            self._recording.stop()
            self._recording = None
            log.warning("no profile: the run ended before profile.after + profile.steps of its steps")

    def _write(self, trainer: Run) -> None:
        assert self._recording is not None
        found, self._recording = self._recording, None
        found.stop()
        steps = self._options.steps
        numbers = summary(found.spans(), found.wall_ms, steps=steps, waits=found.waits())
        run, ranks = trainer.config.run, trainer.layout.world_size
        title = f"{run.name}/{run.stage}, steps {self._first} to {trainer.state.step}, rank 0 of {ranks}"
        with explain_disk_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            (self._folder / "summary.json").write_text(json.dumps({"title": title, **numbers}, indent=1))
            (self._folder / "summary.txt").write_text(page(title, numbers))
            if self._options.trace:
                found.write_trace(self._folder / "trace.json.gz")
        log.info("profile of steps %d to %d: %s", self._first, trainer.state.step, self._folder / "summary.txt")
