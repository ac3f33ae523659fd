"""`schedule.json`: which stages a chain has, how far each is, and whose weights it started from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemovl_train.checkpoint.files import explain_disk_errors, replace_text
from nemovl_train.exceptions import ConfigError
from nemovl_train.parallel.layout import launch_rank

FORMAT_VERSION = 1
PENDING, RUNNING, DONE = "pending", "running", "done"


@dataclass
class StageEntry:
    """One stage of a chain.

    Attributes:
        name: Folder of the stage.
        recipe: Recipe it is made from.
        state: `pending`, `running` or `done`.
        parent: Checkpoint whose weights it started from, relative to the run folder.
        checkpoint: Its last checkpoint, relative to the run folder; None until it is done.
        parent_seal: Hash that seals the parent; None in records that are older than this field.
        unchanged: Parts that it promised to leave alone and that are its parent's, bit by bit; None where nobody could
            compare.
        evaluation: Loss of every held-out set, by name; None without an evaluation.
    """

    name: str
    recipe: str
    state: str = PENDING
    parent: str | None = None
    checkpoint: str | None = None
    parent_seal: str | None = None
    unchanged: list[str] | None = None
    evaluation: dict[str, float | None] | None = None


@dataclass
class Ledger:
    """The chain's record. The checkpoints decide what is done; the ledger tells people and reports.

    Attributes:
        path: Where `schedule.json` lives.
        stages: Entries in order.
        exported: Which checkpoint the exported folder holds: `checkpoint`, its path relative to the run folder, and
            `integrity`, its seal. None until there is an export.
    """

    path: Path
    stages: list[StageEntry] = field(default_factory=list)
    exported: dict[str, str] | None = None

    @classmethod
    def open(cls, path: Path, stages: list[StageEntry]) -> Ledger:
        """Start a record, or take up the one that is there.

        Raises:
            ConfigError: The folder holds a chain of other stages.
        """
        if path.is_file():
            found = json.loads(path.read_text())
            if found.get("format_version") != FORMAT_VERSION:
                raise ConfigError(
                    [f"{path}: format {found.get('format_version')}, this version reads {FORMAT_VERSION}"]
                )
            entries = [StageEntry(**entry) for entry in found["stages"]]
            old, new = [(e.name, e.recipe) for e in entries], [(e.name, e.recipe) for e in stages]
            if old != new:
                raise ConfigError(
                    [f"{path.parent} holds another schedule: {old}, this one has {new}", "choose another run.name"]
                )
            return cls(path, entries, found.get("exported"))
        ledger = cls(path, stages)
        ledger.write()
        return ledger

    def update(self, entry: StageEntry, **changes: Any) -> None:
        """Change an entry, and write the record if that made a difference."""
        before = asdict(entry)
        for name, value in changes.items():
            setattr(entry, name, value)
        if asdict(entry) != before:
            self.write()

    def write(self) -> None:
        """Replace the file in one move; only the first process writes."""
        if launch_rank() != 0:
            return
        with explain_disk_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        stages = [asdict(e) for e in self.stages]
        record = {"format_version": FORMAT_VERSION, "stages": stages, "exported": self.exported}
        replace_text(self.path, json.dumps(record, indent=1))
