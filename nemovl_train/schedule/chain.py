"""Run a schedule: parts, stages one after the other, export, verification, report.

Nothing here is remembered in memory only. Every piece leaves a folder that appears in one move, so the same command
after any interruption skips what is there and continues the stage that was running.
"""

from __future__ import annotations

import logging
from pathlib import Path

from nemovl_train.config.compose import compose_stage
from nemovl_train.config.schema import ScheduleConfig
from nemovl_train.schedule.ledger import DONE, RUNNING, Ledger, StageEntry
from nemovl_train.schedule.parts import prepare_parts

log = logging.getLogger(__name__)


def run(config: ScheduleConfig) -> int:
    """Run the chain, or continue it where it stopped. Under torchrun every rank calls it.

    Args:
        config: A validated schedule.

    Returns:
        Exit code of the first stage that asked to be requeued, else 0.
    """
    from nemovl_train.training import trainer

    root = Path(config.run.root) / config.run.name
    ledger = Ledger.open(
        root / "schedule.json", [StageEntry(Path(stage.recipe).name, stage.recipe) for stage in config.stages]
    )
    parent = prepare_parts(config, root)
    for entry, stage in zip(ledger.stages, config.stages, strict=True):
        values = {"run.stage": entry.name, "trainer.init_from": str(parent)}
        stage_config = compose_stage(config, stage, values=values)
        ledger.update(entry, state=RUNNING, parent=str(parent.relative_to(root)))
        log.info("stage %s: from %s", entry.name, parent.relative_to(root))
        code = trainer.run(stage_config)
        if code != trainer.EXIT_DONE:
            return code
        parent = root / entry.name / "checkpoints" / f"step_{stage_config.trainer.steps:08d}"
        ledger.update(entry, state=DONE, checkpoint=str(parent.relative_to(root)))
    if config.export:
        _publish(root, parent)
    return 0


def _publish(root: Path, checkpoint: Path) -> None:
    """Export the last stage, prove that the folder loads elsewhere, write the report."""
    from nemovl_train.convert.checkpoints import export_checkpoint
    from nemovl_train.convert.verify import verify
    from nemovl_train.report.html import write_report

    out = root / "hf"
    if not out.exists():
        export_checkpoint(checkpoint, out)
    if not (out / "verification.json").exists():
        verify(out, reference=checkpoint)
    report = write_report(root)
    log.info("exported model: %s   report: %s", out, report)
