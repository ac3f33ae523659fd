"""`metrics.jsonl` and `events.jsonl`: one JSON object a line, rank 0 only."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from nemovl_train.checkpoint.files import explain_disk_errors, replace_text
from nemovl_train.training.callbacks.base import Callback, Run
from nemovl_train.training.step import StepResult


def truncate_after(path: Path, step: int) -> None:
    """Drop lines of steps that a restart is going to take again, and a last line that was cut off.

    Args:
        path: A `metrics.jsonl`.
        step: Last step that counts.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(f"{line}\n")
    replace_text(path, "".join(kept))


class MetricsFile(Callback):
    """Writes every step's numbers.

    Args:
        folder: The stage's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: IO[str] | None = None

    def on_start(self, trainer: Run) -> None:
        """Open the files, without the rows of steps that will be taken again."""
        path = self.folder / "metrics.jsonl"
        truncate_after(path, trainer.state.step)
        with explain_disk_errors(self.folder):
            self.metrics = path.open("a", buffering=1)
        hosts = trainer.telemetry.hosts
        self._event(trainer, "start", parent=trainer.state.parent, resumed_from_step=trainer.state.step, hosts=hosts)

    def on_step(self, trainer: Run, result: StepResult, *, lr: float, data_seconds: float) -> None:
        """Write the step's row, and an event when the step changed nothing."""
        state = trainer.state
        elapsed = result.seconds + data_seconds
        row: dict[str, Any] = {
            "step": state.step,
            "loss": _finite(result.loss),
            "grad_norm": _finite(result.grad_norm),
            "lr": lr,
            "applied": result.applied,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised,
            "visual_tokens": result.visual,
            "samples": result.samples,
            "tiles": result.tiles,
            "fill": result.tokens / result.capacity,
            "tokens_per_second": result.tokens / elapsed,
            "step_seconds": result.seconds,
            "data_seconds": data_seconds,
            "tokens_seen": state.tokens_seen,
            "packs_consumed": state.packs_consumed,
        }
        if trainer.numbers is not None:
            row |= {key: value for key, value in asdict(trainer.numbers).items() if value is not None}
        assert self.metrics is not None
        with explain_disk_errors(self.folder):
            self.metrics.write(json.dumps(row) + "\n")
        if not result.applied:
            found = {"loss": str(result.loss), "grad_norm": str(result.grad_norm)}
            self._event(trainer, "skipped_step", **found, samples=trainer.step_keys)

    def on_checkpoint(self, trainer: Run, folder: Path) -> None:
        """Note the checkpoint."""
        self._event(trainer, "checkpoint", folder=folder.name)

    def on_end(self, trainer: Run) -> None:
        """Note that nothing is left to do."""
        self._event(trainer, "end")

    def close(self) -> None:
        """Close the file."""
        if self.metrics is not None:
            # Every row was flushed when it was written. What is left is one that the disk refused: closing tries it
            # again, and that error would take the place of the one that says what to do.
            with suppress(OSError):
                self.metrics.close()

    def _event(self, trainer: Run, kind: str, **fields: Any) -> None:
        row = {"time": time.time(), "event": kind, "step": trainer.state.step, **fields}
        with explain_disk_errors(self.folder), (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _finite(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity; the event of a skipped step says which it was."""
    return value if value is not None and math.isfinite(value) else None
