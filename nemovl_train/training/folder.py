"""The folder of one stage: what is in it, and whose it is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from nemovl_train.config.dump import config_diff, config_hash, dump_yaml, load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import CheckpointError, ConfigError


@dataclass(frozen=True)
class StageFolder:
    """`root/name/stage`, fixed by the config and never time-stamped, so that a restart finds it again.

    Attributes:
        path: The folder.
        run_id: Identity that checkpoints carry.
        steps: Steps after which the stage is done.
        needs_evaluation: Whether a finished stage has an evaluation.
    """

    path: Path
    run_id: str
    steps: int
    needs_evaluation: bool

    @classmethod
    def open(cls, config: RunConfig) -> StageFolder:
        """Create the folder, or recognise it as this run's.

        Raises:
            ConfigError: Another recipe, or this one with other options that decide the result, lives here.
            CheckpointError: The folder cannot be written.
        """
        path = Path(config.run.root) / config.run.name / config.run.stage
        run_id = f"{config.run.name}/{config.run.stage}/{config_hash(config)[:12]}"
        folder = cls(path, run_id, config.trainer.steps, bool(config.evaluation.sources))
        written = path / "config.yaml"
        if int(os.environ.get("RANK", "0")) == 0:
            _make(path)
            if written.is_file():
                _refuse_other_run(path, config)
            _replace(written, dump_yaml(config))
        return folder

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.path / "checkpoints"

    def is_done(self) -> bool:
        """All steps are taken and, where asked for, the evaluation is written."""
        last = self.checkpoints / f"step_{self.steps:08d}" / "COMPLETE"
        return last.is_file() and (self.evaluation() is not None or not self.needs_evaluation)

    def evaluation(self) -> dict | None:
        """Contents of `evaluation.json`, if the evaluation is complete."""
        path = self.path / "evaluation.json"
        return json.loads(path.read_text()) if path.is_file() else None


def _refuse_other_run(path: Path, config: RunConfig) -> None:
    changes = config_diff(load_yaml(RunConfig, path / "config.yaml"), config)
    if changes:
        raise ConfigError(
            [f"{path} holds another run: {change}" for change in changes]
            + [f"choose another run.name, or remove {path} to start it again"]
        )


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write_probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"run folder {path} is not writable ({error.strerror}): choose another place with run.root=DIR"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never half."""
    work = path.with_suffix(".tmp")
    try:
        work.write_text(text)
        os.replace(work, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror}): free space, or use another run.root") from error
