"""Run a schedule: parts, stages one after the other, export, verification, report.

Nothing here is remembered in memory only. Every piece leaves a folder that appears in one move, so the same command
after any interruption skips what is there and continues the stage that was running.

Parts come before the processes of a launcher join, export and report after they have parted: the first process does
both alone.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from nemovl_train.checkpoint import sealed
from nemovl_train.config.compose import compose_stage
from nemovl_train.config.schema import RunConfig, ScheduleConfig
from nemovl_train.exceptions import ConfigError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.parallel.layout import alone, launch_rank, shutdown
from nemovl_train.report.environment import record_environment
from nemovl_train.schedule.ledger import DONE, RUNNING, Ledger, StageEntry
from nemovl_train.schedule.parts import joined_checkpoint, prepare_parts
from nemovl_train.training import trainer
from nemovl_train.training.folder import StageFolder
from nemovl_train.training.handover import read_handover

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
EXPORT = "hf"


def run(config: ScheduleConfig) -> ExitCode:
    """Run the chain, or continue it where it stopped. Under torchrun every rank calls it.

    Args:
        config: A validated schedule.

    Returns:
        `ExitCode.OK`; `ExitCode.REQUEUE` when a stage was asked to stop; `ExitCode.FAILED` when the exported folder
        does not pass its verification.
    """
    root = Path(config.run.root) / config.run.name
    stages = [compose_stage(config, stage) for stage in config.stages]
    entries = [StageEntry(s.run.stage, c.recipe) for s, c in zip(stages, config.stages, strict=True)]
    ledger = Ledger.open(root / "schedule.json", entries)
    _refuse_orphans(root, [StageFolder.of(stage).path for stage in stages])
    record_environment(root)
    code = _parts(config, root)
    if code != ExitCode.OK:
        return code
    parent = joined_checkpoint(root)
    for entry, stage in zip(ledger.stages, config.stages, strict=True):
        stage_config = compose_stage(config, stage, values={"trainer.init_from": str(parent)})
        code = _stage(stage_config, entry, ledger, root)
        if code != ExitCode.OK:
            return code
        parent = StageFolder.of(stage_config).last_checkpoint
    shutdown()
    if config.export and launch_rank() == 0:
        with alone():
            return _publish(root, parent, ledger)
    return ExitCode.OK


def _refuse_orphans(root: Path, folders: list[Path]) -> None:
    """A stage that was removed is trained again; what came after it has the removed weights, and would be kept."""
    missing = next((i for i, folder in enumerate(folders) if not (folder / "config.yaml").is_file()), None)
    if missing is None:
        return
    orphans = [path for path in (*folders[missing + 1 :], root / EXPORT) if path.exists()]
    if orphans:
        names = ", ".join(str(path) for path in orphans)
        problem = f"{folders[missing]} is missing, and what was made from it is still there"
        raise ConfigError([f"{problem}: remove {names} too, or choose another run.name"])


def _parts(config: ScheduleConfig, root: Path) -> ExitCode:
    """Make the joined parts in the first process, while the others wait for the checkpoint to appear."""
    if launch_rank() == 0:
        with alone():
            return prepare_parts(config, root)
    # Without a time limit of its own: when the first process fails, the launcher ends this one.
    while sealed.seal_of(joined_checkpoint(root)) is None:
        time.sleep(POLL_SECONDS)
    return ExitCode.OK


def _stage(config: RunConfig, entry: StageEntry, ledger: Ledger, root: Path) -> ExitCode:
    folder = StageFolder.of(config)
    assert config.trainer.init_from is not None
    parent = str(Path(config.trainer.init_from).relative_to(root))
    seal = sealed.seal_of(Path(config.trainer.init_from))
    # A finished stage needs no parent: its checkpoint may have gone to make room.
    if seal and entry.parent_seal not in (None, seal) and (folder.path / "config.yaml").is_file():
        raise ConfigError(
            [
                f"{folder.path} started from other weights than {root / parent} holds now: it was made again since; "
                f"remove {folder.path} and what was made from it, or choose another run.name"
            ]
        )
    if not folder.is_done():
        ledger.update(
            entry, state=RUNNING, parent=parent, parent_seal=seal, checkpoint=None, unchanged=None, evaluation=None
        )
        log.info("stage %s: from %s", entry.name, parent)
    code = trainer.run(config)
    if code == ExitCode.OK:
        found = read_handover(folder.path)
        ledger.update(
            entry,
            state=DONE,
            parent=parent,
            parent_seal=seal or entry.parent_seal,
            checkpoint=str(folder.last_checkpoint.relative_to(root)),
            unchanged=found.get("unchanged"),
            evaluation=found.get("evaluation"),
        )
    return code


def _publish(root: Path, checkpoint: Path, ledger: Ledger) -> ExitCode:
    """Export the last stage, prove that the folder loads elsewhere, write the report."""
    from nemovl_train.convert.checkpoints import export_checkpoint
    from nemovl_train.convert.verify import verify
    from nemovl_train.report.html import write_report

    out = root / EXPORT
    source = {"checkpoint": str(checkpoint.relative_to(root)), "integrity": sealed.seal_of(checkpoint) or ""}
    if ledger.exported != source or not out.exists():
        # Replaces the export of a checkpoint that is no longer the chain's last; its verification goes with it.
        export_checkpoint(checkpoint, out, overwrite=True)
        ledger.exported = source
        ledger.write()
    verified = _verified(out) or verify(out, reference=checkpoint)["ok"]
    report = write_report(root)
    if not verified:
        log.error("the exported folder failed its verification: %s says what is wrong", out / "verification.md")
        return ExitCode.FAILED
    log.info("exported model: %s   report: %s", out, report)
    return ExitCode.OK


def _verified(out: Path) -> bool:
    """Whether an earlier verification passed; one that was cut off or failed is done again."""
    try:
        return bool(json.loads((out / "verification.json").read_text(encoding="utf-8"))["ok"])
    except (OSError, ValueError, KeyError):
        return False
