"""`RUN/report.html`: one file that needs nothing else, from whatever a run folder holds.

The page loads no script, font or image from anywhere: its content security policy forbids it, since questions and
answers are other people's text.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nemovl_train.exceptions import UserError
from nemovl_train.report import formats
from nemovl_train.report.charts import Line, line_chart
from nemovl_train.report.collect import RUNNING, Run, Stage, read_run
from nemovl_train.report.predictions import collect_cards
from nemovl_train.report.summary import StageSummary, summarise_run, summarise_stage
from nemovl_train.report.tables import config_lines, evaluation_rows, event_rows, exported_rows

FILE_NAME = "report.html"


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not, in one move.

    Args:
        run_folder: `runs/NAME` of a schedule or of a single `nemovl train`, or one stage's own folder.
        out: File to write; `report.html` in the folder when None.

    Returns:
        The file.

    Raises:
        UserError: The folder does not exist, or the file cannot be written.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {folder}: type `nemovl report runs/NAME`")
    text = render(read_run(folder), now=time.time(), command=f"nemovl report {run_folder}")
    path = Path(out) if out else folder / FILE_NAME
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(path)
    except OSError as error:
        work.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}): free space, or make the folder writable") from error
    return path


def render(run: Run, *, now: float, command: str) -> str:
    """The page as text.

    Args:
        run: What the folder holds.
        now: Unix time that the page says it was made at.
        command: What the page says to type to make it again.
    """
    summaries = [summarise_stage(stage) for stage in run.stages]
    part_summaries = [summarise_stage(part) for part in run.parts]
    evaluated = [(hue, stage) for hue, stage in enumerate(run.stages) if stage.evaluation]
    page = _templates().get_template("report.html")
    return page.render(
        run=run,
        now=now,
        command=command,
        name=run.folder.name,
        total=summarise_run(run, summaries),
        stages=list(zip(run.stages, summaries, strict=True)),
        parts=list(zip(run.parts, part_summaries, strict=True)),
        part_loss=_losses(run.parts, part_summaries, log=False) if any(part.rows for part in run.parts) else "",
        charts=_charts(run.stages, summaries),
        evaluated=evaluated,
        evaluation=evaluation_rows([stage for _, stage in evaluated]),
        exported=[(label, found, exported_rows(found)) for label, found in run.evaluations.items()],
        cards=collect_cards(run.stages),
        answering=[(hue, stage) for hue, stage in enumerate(run.stages) if stage.predictions],
        configs=_configs(run.stages),
        events=event_rows(run.stages),
        num_events=sum(len(stage.events) for stage in run.stages),
    )


@cache
def _templates() -> Environment:
    # PackageLoader also finds the templates in an installed wheel.
    templates = Environment(
        loader=PackageLoader("nemovl_train.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "decimal", "percent", "duration", "size", "moment"):
        templates.filters[name] = getattr(formats, name)
    templates.tests["known"] = lambda value: isinstance(value, int | float) and math.isfinite(value)
    templates.tests["records"] = _is_records
    return templates


def _is_records(value: Any) -> bool:
    """Whether a value is a list of mappings, which reads best as a table."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _charts(stages: Sequence[Stage], summaries: Sequence[StageSummary]) -> dict[str, Markup]:
    """Every chart by name; none when no stage has taken a step."""
    if not any(stage.rows for stage in stages):
        return {}

    def lines(key: str) -> list[Line]:
        return _lines(stages, summaries, key)

    validated = [replace(stage, rows=stage.validations) for stage in stages]
    return {
        "loss": _losses(stages, summaries, log=False),
        "validation": (
            line_chart(_lines(validated, summaries, "loss"), title="Held-out loss while training", averaged=False)
            if any(stage.validations for stage in stages)
            else Markup()
        ),
        "loss_log": _losses(stages, summaries, log=True),
        "lr": line_chart(lines("lr"), title="Learning rate", bounds=(0.0, None), averaged=False),
        "grad_norm": line_chart(lines("grad_norm"), title="Gradient norm (log)", log=True),
        "throughput": line_chart(
            lines("tokens_per_second"), title="Tokens per second", show=formats.count, bounds=(0.0, None)
        ),
        "fill": line_chart(
            lines("fill"),
            title="Packing fill (%)",
            show=formats.percent,
            label=lambda share: formats.tick(100 * share),
            bounds=(0.0, 1.0),
        ),
    }


def _losses(stages: Sequence[Stage], summaries: Sequence[StageSummary], *, log: bool) -> Markup:
    title = "Training loss (log)" if log else "Training loss"
    return line_chart(_lines(stages, summaries, "loss"), title=title, log=log)


def _lines(stages: Sequence[Stage], summaries: Sequence[StageSummary], key: str) -> list[Line]:
    """One line a stage; a running stage takes up the steps it will have."""
    lines = []
    crowded = len(stages) > 2
    for hue, (stage, summary) in enumerate(zip(stages, summaries, strict=True)):
        pairs = [p for p in zip(stage.column("step"), stage.column(key), strict=True) if math.isfinite(p[0])]
        if not pairs:
            continue
        planned = summary.planned if stage.state == RUNNING and math.isfinite(summary.planned) else 0.0
        steps, values = zip(*pairs, strict=True)
        lines.append(Line(stage.short if crowded else stage.name, hue, steps, values, max(summary.steps, planned, 1.0)))
    return lines


def _configs(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Config of each stage that has one, against the one before it."""
    found: list[dict[str, Any]] = []
    before: Stage | None = None
    for hue, stage in enumerate(stages):
        if not stage.config:
            continue
        lines = list(config_lines(stage.config, before.config if before else None))
        changes = sum(bool(line.change) for line in lines)
        previous = before.name if before else ""
        found.append({"stage": stage, "hue": hue, "lines": lines, "changes": changes, "before": previous})
        before = stage
    return found
