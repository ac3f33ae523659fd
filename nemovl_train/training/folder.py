"""The folder of one stage: what is in it, and whose it is."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.files import explain_disk_errors, replace_text
from nemovl_train.checkpoint.lineage import FILE as LINEAGE
from nemovl_train.config.dump import Change, config_diff, config_hash, dump_yaml, load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import CheckpointError, ConfigError
from nemovl_train.parallel.agree import on_first_rank
from nemovl_train.training.ending import FILE as ENDING
from nemovl_train.training.ending import ending_of
from nemovl_train.training.handover import FILE as HANDOVER
from nemovl_train.training.handover import read_handover
from nemovl_train.training.lock import FolderLock

log = logging.getLogger(__name__)

_RUN_FILE = "run.json"


@dataclass(frozen=True)
class StageFolder:
    """`root/name/stage`, fixed by the config and never time-stamped, so that a restart finds it again.

    Attributes:
        path: The folder.
        config: What runs in it.
    """

    path: Path
    config: RunConfig
    _held: ExitStack = field(default_factory=ExitStack, init=False, repr=False, compare=False)
    _identity: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, config: RunConfig) -> StageFolder:
        """The folder that a config names; nothing is read or written."""
        return cls(Path(config.run.root) / config.run.name / config.run.stage, config)

    @property
    def run_id(self) -> str:
        """Identity that the stage's checkpoints carry: that of its first start, also when later ones change options."""
        run = self.config.run
        return self._identity.get("run_id") or f"{run.name}/{run.stage}/{config_hash(self.config)[:12]}"

    @property
    def recognised(self) -> bool:
        """Whether the folder's config was there and is this one, apart from what `checkpoint.accept_changes` allows."""
        return bool(self._identity)

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that a finished stage has: of its last step, or of the one at which it ended early."""
        ending = ending_of(self.path, self.config)
        return sealed.step_folder(self.checkpoints, self.config.trainer.steps if ending is None else ending.step)

    def claim(self) -> None:
        """Create the folder, or recognise it as this run's and tidy it. Collective.

        The folder is this run's alone until `release`, or until its process ends, however that happens.

        Raises:
            ConfigError: Another recipe, or this one with other options that decide the result, lives here.
            CheckpointError: The folder cannot be written, or another process uses it.
        """
        self._identity.update(on_first_rank(self._claim))

    def release(self) -> None:
        """Let another process claim the folder. Each rank for itself; without a claim nothing happens."""
        self._held.close()

    def is_done(self) -> bool:
        """It ended with these options (last step, or no better held-out loss), evaluated, with frozen parts intact."""
        evaluated = (self.path / "evaluation.json").is_file() or not self.config.evaluation.sources
        ended = ending_of(self.path, self.config) is not None
        record = read_handover(self.path)
        # What began with a parent ends with a comparison; stages without a record of their start are older than it.
        compared = bool(record) or not (self.path / LINEAGE).is_file()
        sound = compared and not record.get("changed_tensors")
        return ended and evaluated and sound and (self.last_checkpoint / "COMPLETE").is_file()

    def newest_checkpoint(self) -> sealed.Verified | None:
        """Where to continue; every rank gets the same. Collective."""
        return sealed.newest(self.checkpoints, run_id=self.run_id)

    def _claim(self) -> dict[str, str]:
        with explain_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.callback(FolderLock(self.path).release)
        _probe(self.path)
        written = self.path / "config.yaml"
        # A start that failed before its first step (a misspelt path, say) left nothing worth protecting.
        started = (self.path / "metrics.jsonl").is_file() or bool(sealed.published(self.checkpoints))
        identity: dict[str, str] = {}
        if started and written.is_file():
            for change in _refuse_other_run(self.path, self.config):
                log.warning("%s: continuing with another option, as allowed: %s", self.path, change)
            identity["run_id"] = self._first_run_id()
        if not identity:
            for left in (LINEAGE, HANDOVER, ENDING, "evaluation.json"):
                (self.path / left).unlink(missing_ok=True)
            replace_text(self.path / _RUN_FILE, json.dumps({"run_id": self.run_id}))
        replace_text(written, dump_yaml(self.config))
        sealed.clean(self.checkpoints)
        return identity

    def _first_run_id(self) -> str:
        try:
            return str(json.loads((self.path / _RUN_FILE).read_text(encoding="utf-8"))["run_id"])
        except (OSError, ValueError, KeyError):
            return self.run_id


def _refuse_changed(path: Path) -> None:
    """A stage whose frozen parts moved is not handed on, by name or by one of its checkpoints."""
    for stage in (path, path.parent, path.parent.parent):
        if changed := read_handover(stage).get("changed_tensors"):
            raise CheckpointError(
                f"{stage} was to leave parts alone and changed {len(changed)} of their tensors, {changed[0]} among "
                f"them (its {HANDOVER}): train it again from its parent"
            )


def resolve_checkpoint(path: Path) -> Path | sealed.Verified:
    """A checkpoint from its folder, a `checkpoints` folder, or a stage folder. Collective.

    Returns:
        The path itself where it is a checkpoint, not yet verified; else the newest good one below.

    Raises:
        CheckpointError: Nothing loadable is there.
    """
    on_first_rank(lambda: _refuse_changed(path))
    if on_first_rank(lambda: (path / "integrity.json").is_file()):
        return path
    for root in (path / "checkpoints", path):
        found = sealed.newest(root)
        if found is not None:
            return found
    raise CheckpointError(f"{path}: no complete checkpoint here (trainer.init_from takes a stage or checkpoint folder)")


def _refuse_other_run(path: Path, config: RunConfig) -> list[Change]:
    """Options that decide the result and differ from those that the folder's run has.

    Raises:
        ConfigError: Some of them are not accepted.
    """
    accepted = config.checkpoint.accept_changes
    changes = config_diff(load_yaml(RunConfig, path / "config.yaml"), config)
    refused = [
        change
        for change in changes
        if not any(fnmatchcase(change.key, key) or change.key.startswith(f"{key}.") for key in accepted)
    ]
    if refused:
        keys = ",".join(change.key for change in refused)
        raise ConfigError(
            [
                *(f"{path} holds another run: {change}" for change in refused),
                f"choose another run.stage, or remove the folder to start it again; to continue it with other options "
                f"all the same: 'checkpoint.accept_changes=[{keys}]'",
            ]
        )
    return changes


def _probe(path: Path) -> None:
    probe = path / ".write_probe"
    with explain_disk_errors(path):
        probe.touch()
        probe.unlink()
