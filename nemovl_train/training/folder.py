"""The folder of one stage: what is in it, and whose it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.files import explain_disk_errors, replace_text
from nemovl_train.config.dump import config_diff, config_hash, dump_yaml, load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import CheckpointError, ConfigError
from nemovl_train.parallel.agree import on_first_rank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageFolder:
    """`root/name/stage`, fixed by the config and never time-stamped, so that a restart finds it again.

    Attributes:
        path: The folder.
        config: What runs in it.
    """

    path: Path
    config: RunConfig

    @classmethod
    def of(cls, config: RunConfig) -> StageFolder:
        """The folder that a config names; nothing is read or written."""
        return cls(Path(config.run.root) / config.run.name / config.run.stage, config)

    @property
    def run_id(self) -> str:
        """Identity that the stage's checkpoints carry."""
        run = self.config.run
        return f"{run.name}/{run.stage}/{config_hash(self.config)[:12]}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that a finished stage has."""
        return sealed.step_folder(self.checkpoints, self.config.trainer.steps)

    def claim(self) -> None:
        """Create the folder, or recognise it as this run's and tidy it. Collective.

        Raises:
            ConfigError: Another recipe, or this one with other options that decide the result, lives here.
            CheckpointError: The folder cannot be written.
        """
        on_first_rank(self._claim)

    def is_done(self) -> bool:
        """All steps are taken and, where asked for, the evaluation is written."""
        evaluated = (self.path / "evaluation.json").is_file() or not self.config.evaluation.sources
        return evaluated and (self.last_checkpoint / "COMPLETE").is_file()

    def newest_checkpoint(self) -> Path | None:
        """Where to continue; every rank gets the one that rank 0 verified. Collective."""
        return on_first_rank(lambda: sealed.latest(self.checkpoints, run_id=self.run_id))

    def _claim(self) -> None:
        _make(self.path)
        written = self.path / "config.yaml"
        if written.is_file():
            _refuse_other_run(self.path, self.config)
        replace_text(written, dump_yaml(self.config))
        sealed.clean(self.checkpoints)


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself, a `checkpoints` folder, or a stage folder.

    Raises:
        CheckpointError: Nothing loadable is there.
    """
    if (path / "integrity.json").is_file():
        return path
    for root in (path / "checkpoints", path):
        found = sealed.latest(root)
        if found is not None:
            return found
    raise CheckpointError(f"{path}: no complete checkpoint here (trainer.init_from takes a stage or checkpoint folder)")


def _refuse_other_run(path: Path, config: RunConfig) -> None:
    changes = config_diff(load_yaml(RunConfig, path / "config.yaml"), config)
    if changes:
        raise ConfigError(
            [f"{path} holds another run: {change}" for change in changes]
            + [f"choose another run.name, or remove {path} to start it again"]
        )


def _make(path: Path) -> None:
    probe = path / ".write_probe"
    with explain_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
