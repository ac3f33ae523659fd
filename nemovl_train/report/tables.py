"""Tables of the report: evaluation sets by stage, configs with their changes, checkpoints and events."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemovl_train.report.collect import Stage
from nemovl_train.report.formats import clip, number

MAX_EVENTS = 100
MAX_LIST_ITEMS = 6


@dataclass(frozen=True)
class Cell:
    """One evaluation set after one stage; NaN where it was not measured.

    Attributes:
        exact_match: Share of answers that equal the reference, in [0, 1].
        loss: Mean loss of the supervised tokens.
        samples: Samples read.
        heat: Goodness in [0, 1] that the cell is coloured by: the share itself, or the loss between the row's ends.
        best: Best of its row, when the row has something to compare.
    """

    exact_match: float
    loss: float
    samples: float
    heat: float
    best: bool


@dataclass(frozen=True)
class EvaluationRow:
    """An evaluation set: its name, whether it is judged by exact match, and a cell per column."""

    source: str
    exact: bool
    cells: list[Cell]


def evaluation_rows(stages: Sequence[Stage]) -> list[EvaluationRow]:
    """Evaluation sets as rows and stages as columns, like tables 4 and 6 of arXiv 2511.03929.

    Args:
        stages: The columns.

    Returns:
        Sets judged by exact match first, each group in the order of its first appearance.
    """
    sources: dict[str, list[dict[str, Any]]] = {}
    for column, stage in enumerate(stages):
        found = stage.evaluation.get("sources")
        for name, result in found.items() if isinstance(found, dict) else ():
            if isinstance(result, dict):
                sources.setdefault(str(name), [{} for _ in stages])[column] = result
    rows = [_evaluation_row(name, results) for name, results in sources.items()]
    return sorted(rows, key=lambda row: not row.exact)


def _evaluation_row(source: str, results: Sequence[Mapping[str, Any]]) -> EvaluationRow:
    matches = [number(result.get("exact_match")) for result in results]
    losses = [number(result.get("loss")) for result in results]
    exact = any(math.isfinite(match) for match in matches)
    goodness = matches if exact else [-loss for loss in losses]
    known = [value for value in goodness if math.isfinite(value)]
    top, bottom = max(known, default=math.nan), min(known, default=math.nan)
    cells = []
    for result, match, loss, good in zip(results, matches, losses, goodness, strict=True):
        spread = (good - bottom) / (top - bottom) if top > bottom else 0.0
        heat = match if exact else spread
        cells.append(
            Cell(
                exact_match=match,
                loss=loss,
                samples=number(result.get("samples")),
                heat=min(1.0, max(0.0, heat)) if math.isfinite(heat) else 0.0,
                best=len(known) > 1 and top > bottom and good == top,
            )
        )
    return EvaluationRow(source, exact, cells)


def exported_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `nemovl eval` found for one exported model: a row a set, its groups beneath, scores in percent."""
    rows = []
    sources = evaluation.get("sources")
    for name, result in sources.items() if isinstance(sources, dict) else ():
        if not isinstance(result, dict):
            continue
        rows.append(_exported_row(str(name), result.get("metrics"), result))
        groups = result.get("groups")
        for group, found in groups.items() if isinstance(groups, dict) else ():
            if isinstance(found, dict):
                scores = {key: value for key, value in found.items() if key != "samples"}
                rows.append(_exported_row(f"{name}: {group}", scores, {"samples": found.get("samples")}))
    return rows


def _exported_row(name: str, scores: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"set": name, "samples": result.get("samples")}
    if result.get("left_out"):
        row["left out"] = result["left_out"]
    for metric, value in scores.items() if isinstance(scores, dict) else ():
        row[str(metric)] = f"{100 * number(value):.1f}%" if math.isfinite(number(value)) else "-"
    if math.isfinite(number(result.get("loss"))):
        row["loss"] = number(result["loss"])
    return row


@dataclass(frozen=True)
class ConfigLine:
    """A line of a config.

    Attributes:
        depth: Nesting.
        key: Last part of the key.
        value: As YAML would write it; None for a section.
        change: `""`, `changed`, `added` or `removed`, against the stage before.
        old: Value before, where it changed.
    """

    depth: int
    key: str
    value: str | None
    change: str = ""
    old: str = ""


def config_lines(config: Mapping[str, Any], before: Mapping[str, Any] | None, depth: int = 0) -> Iterator[ConfigLine]:
    """A config line by line, with what differs from another one.

    Args:
        config: The config as nested mappings.
        before: The config to compare with; None marks nothing.
        depth: Nesting of the outermost keys.
    """
    known = before if isinstance(before, Mapping) else {}
    keys = [*config, *(key for key in known if key not in config)]
    for key in keys:
        new, old = config.get(key), known.get(key)
        change = _change(key, config, before)
        if isinstance(new, Mapping) and new:
            yield ConfigLine(depth, str(key), None)
            inner = old if isinstance(old, Mapping) else {}
            yield from config_lines(new, None if before is None else inner, depth + 1)
        elif change == "removed":
            yield ConfigLine(depth, str(key), "", change, scalar(old))
        else:
            yield ConfigLine(depth, str(key), scalar(new), change, scalar(old) if change == "changed" else "")


def _change(key: Any, config: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    if before is None:
        return ""
    if key not in config:
        return "removed"
    if key not in before:
        return "added"
    return "changed" if config[key] != before[key] else ""


def scalar(value: Any) -> str:
    """A value on one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


@dataclass(frozen=True)
class EventRow:
    """An event: stage and its colour, unix time, kind, step, and the other fields as text."""

    stage: str
    hue: int
    time: float
    kind: str
    step: float
    detail: str


def event_rows(stages: Sequence[Stage]) -> list[EventRow]:
    """The latest `MAX_EVENTS` events of all stages in the order of their time."""
    rows = [
        EventRow(
            stage.name,
            hue,
            number(event.get("time")),
            str(event.get("event")),
            number(event.get("step")),
            _detail(event),
        )
        for hue, stage in enumerate(stages)
        for event in stage.events
    ]
    rows.sort(key=lambda row: row.time if math.isfinite(row.time) else 0.0)
    return rows[-MAX_EVENTS:]


def _detail(event: Mapping[str, Any]) -> str:
    fields = {key: value for key, value in event.items() if key not in ("time", "event", "step") and value is not None}
    return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in fields.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        more = f" and {len(value) - MAX_LIST_ITEMS} more" if len(value) > MAX_LIST_ITEMS else ""
        return clip(", ".join(scalar(item) for item in value[:MAX_LIST_ITEMS]), 400) + more
    return clip(scalar(value), 400)
