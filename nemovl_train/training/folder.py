"""The folder of one stage: what is in it, and whose it is."""

from __future__ import annotations

import fcntl
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.files import explain_disk_errors, replace_text
from nemovl_train.config.dump import config_diff, config_hash, dump_yaml, load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import CheckpointError, ConfigError
from nemovl_train.parallel.agree import on_first_rank
from nemovl_train.training.validation import stopped_at

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
    _held: ExitStack = field(default_factory=ExitStack, init=False, repr=False, compare=False)

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
        """The checkpoint that a finished stage has: of its last step, or of the one at which it ended early."""
        ended = stopped_at(self.path)
        return sealed.step_folder(self.checkpoints, self.config.trainer.steps if ended is None else ended)

    def claim(self) -> None:
        """Create the folder, or recognise it as this run's and tidy it. Collective.

        The folder is this run's alone until `release`, or until its process ends, however that happens.

        Raises:
            ConfigError: Another recipe, or this one with other options that decide the result, lives here.
            CheckpointError: The folder cannot be written, or another process uses it.
        """
        on_first_rank(self._claim)

    def release(self) -> None:
        """Let another process claim the folder. Each rank for itself; without a claim nothing happens."""
        self._held.close()

    def is_done(self) -> bool:
        """All steps are taken and, where asked for, the evaluation is written."""
        evaluated = (self.path / "evaluation.json").is_file() or not self.config.evaluation.sources
        return evaluated and (self.last_checkpoint / "COMPLETE").is_file()

    def newest_checkpoint(self) -> Path | None:
        """Where to continue; every rank gets the one that rank 0 verified. Collective."""
        return on_first_rank(lambda: sealed.latest(self.checkpoints, run_id=self.run_id))

    def _claim(self) -> None:
        with explain_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        _probe(self.path)
        written = self.path / "config.yaml"
        # A start that failed before its first step (a misspelt path, say) left nothing worth protecting.
        started = (self.path / "metrics.jsonl").is_file() or bool(sealed.published(self.checkpoints))
        if started and written.is_file():
            _refuse_other_run(self.path, self.config)
        replace_text(written, dump_yaml(self.config))
        sealed.clean(self.checkpoints)

    def _lock(self) -> None:
        """Keep other processes out: two of them would remove each other's half-written checkpoints.

        The file stays when the lock goes: removing it could take the lock away from a process that opened it already.
        """
        file = self._held.enter_context((self.path / ".lock").open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{self.path} is in use by another process: wait until it ends, or stop it; then run the same command "
                "again"
            ) from error
        except OSError as error:
            # Some shared file systems have no locks.
            log.warning("%s cannot be locked (%s): start no second run in it", self.path, error.strerror)


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
            [
                f"{path} holds another run: {change}; choose another run.stage, or remove the folder to start it again"
                for change in changes
            ]
        )


def _probe(path: Path) -> None:
    probe = path / ".write_probe"
    with explain_disk_errors(path):
        probe.touch()
        probe.unlink()
