"""The end of a stage: one record, written after everything else, of where it ended and what decided that."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemovl_train.checkpoint.files import replace_text
from nemovl_train.config.schema import RunConfig

FILE = "finished.json"


@dataclass(frozen=True)
class Ending:
    """How a stage ended.

    Attributes:
        step: Its last step.
        decided_by: Options that say when a stage ends and what is measured then. With others it is not at its end.
        best_step: Step with the lowest held-out loss, where that was measured while it trained.
        best_loss: That loss.
    """

    step: int
    decided_by: dict[str, Any]
    best_step: int = 0
    best_loss: float | None = None

    def write(self, folder: Path) -> None:
        """Put the record into a stage's folder."""
        replace_text(folder / FILE, json.dumps(asdict(self), indent=1))


def decisive_options(config: RunConfig) -> dict[str, Any]:
    """What `Ending.decided_by` holds. Where a held-out set lies does not count: folders move."""
    options = config.evaluation
    measured = {"split": options.split, "seq_length": options.seq_length, "max_samples": options.max_samples}
    return {
        "steps": config.trainer.steps,
        "patience": options.patience,
        "heldout": sorted(options.sources),
        **(measured if options.sources else {}),
    }


def ending_of(folder: Path, config: RunConfig) -> Ending | None:
    """The end that a stage has with this config; None while it has none."""
    try:
        found = Ending(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.decided_by == decisive_options(config) else None
