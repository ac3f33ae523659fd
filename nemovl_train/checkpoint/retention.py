"""Which checkpoints of a stage stay."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from nemovl_train.checkpoint.sealed import published

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """What is kept; a checkpoint stays when any of these holds it.

    Attributes:
        last: This many of the newest.
        every: Those whose step divides by this; 0 for none.
        best: This many of lowest recent training loss.
    """

    last: int
    every: int = 0
    best: int = 0


def superseded(newest: Path, keep: Keep) -> list[Path]:
    """Checkpoints that may go, counted from one that was just published and verified.

    Args:
        newest: That one. Later ones are what a restart rejected: they neither count nor go, and are replaced when the
            run reaches their step.
        keep: What stays.
    """
    folders = [folder for folder in published(newest.parent) if folder.name <= newest.name]
    kept = set(folders[-keep.last :]) | {newest}
    if keep.every:
        kept |= {folder for folder in folders if _step(folder) % keep.every == 0}
    if keep.best:
        kept |= set(sorted(folders, key=lambda folder: (_loss(folder), folder.name))[: keep.best])
    return [folder for folder in folders if folder not in kept]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _loss(folder: Path) -> float:
    """Mean of the recent losses that the state remembers; a state that cannot be read is none of the best."""
    try:
        losses = json.loads((folder / "state.json").read_text(encoding="utf-8"))["recent_losses"]
        return sum(losses) / len(losses)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return float("inf")
