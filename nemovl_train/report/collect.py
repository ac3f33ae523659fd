"""Reads a run folder. Everything may be missing, half-written or being written: nothing here raises for that."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nemovl_train.report.formats import number

PENDING, RUNNING, DONE = "pending", "running", "done"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder on disk: its name, whether it is sealed, and its size in bytes."""

    name: str
    complete: bool
    num_bytes: int


@dataclass(frozen=True)
class Stage:
    """What one stage left so far.

    Attributes:
        name: Folder of the stage, relative to the run.
        state: `pending`, `running` or `done`.
        recipe: Recipe it is made from; empty when not known.
        parent: Checkpoint whose weights it started from.
        rows: Lines of `metrics.jsonl`.
        events: Lines of `events.jsonl`.
        validations: Lines of `validation.jsonl`, the held-out loss while training.
        evaluation: `evaluation.json`, empty when missing.
        predictions: `predictions.json`, empty when missing.
        config: `config.yaml`, empty when missing.
        checkpoints: Checkpoint folders in order.
        folder: Where it lives.
        short: Name for places without room: `stage1` for `stage1_sft_16k` where that is unambiguous.
    """

    name: str
    state: str
    recipe: str
    parent: str
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    evaluation: dict[str, Any]
    predictions: list[dict[str, Any]]
    config: dict[str, Any]
    checkpoints: list[Checkpoint]
    folder: Path
    short: str

    @property
    def rest(self) -> str:
        """The name after its short form."""
        return self.name[len(self.short) :].strip("_").replace("_", " ")

    def column(self, key: str) -> list[float]:
        """One value per step; NaN where the row has none."""
        return [number(row.get(key)) for row in self.rows]

    @property
    def started(self) -> float:
        """Unix time of the first event, NaN when there is none."""
        return min((t for e in self.events if math.isfinite(t := number(e.get("time")))), default=math.nan)

    @property
    def last_sign(self) -> float:
        """Unix time of the latest event or metrics line, NaN when there is none."""
        times = [t for e in self.events if math.isfinite(t := number(e.get("time")))]
        metrics = self.folder / "metrics.jsonl"
        if self.state == RUNNING and metrics.is_file():
            times.append(metrics.stat().st_mtime)
        return max(times, default=math.nan)


@dataclass(frozen=True)
class Run:
    """A run folder in memory.

    Attributes:
        folder: Where it lives.
        stages: In the order of the schedule, or of their start.
        parts: Trainings below `parts/`, the pretrained parts that a toy schedule makes first.
        environment: `environment.json`, empty when missing.
        verification: `hf/verification.json`, empty when missing.
        evaluations: What `nemovl eval --report` left in `evaluations/`, by label.
        problems: Files that are there but cannot be read, one sentence each.
    """

    folder: Path
    stages: list[Stage]
    parts: list[Stage]
    environment: dict[str, Any]
    verification: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    problems: list[str]


@dataclass
class Reader:
    """Reads files below one folder, and notes which of them could not be read."""

    root: Path
    problems: list[str] = field(default_factory=list)

    def json(self, path: Path, kind: type) -> Any:
        """A JSON document that must be of type `kind`; an empty one when it is missing or unreadable."""
        return self._load(path, lambda p: json.loads(p.read_text(encoding="utf-8")), kind)

    def yaml(self, path: Path) -> dict[str, Any]:
        """A resolved config as plain data, of any version of the schema; empty when it is missing or unreadable."""
        return self._load(path, lambda p: yaml.safe_load(p.read_text(encoding="utf-8")), dict)

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """Objects of a JSON lines file. A cut-off last line is normal while a run goes on; others are noted."""
        if not path.is_file():
            return []
        rows, bad = [], []
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for position, text in enumerate(texts, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif position < len(texts):
                bad.append(position)
        if bad:
            self._note(path, f"{len(bad)} lines are not JSON objects, the first is line {bad[0]}")
        return rows

    def _load(self, path: Path, parse: Callable[[Path], Any], kind: type) -> Any:
        if not path.is_file():
            return kind()
        try:
            found = parse(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self._note(path, str(error).splitlines()[0])
            return kind()
        if isinstance(found, kind):
            return found
        self._note(path, f"holds a {type(found).__name__}, expected a {kind.__name__}")
        return kind()

    def _note(self, path: Path, what: str) -> None:
        self.problems.append(f"{path.relative_to(self.root)}: {what}")


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Args:
        folder: `runs/NAME` of a schedule or of a single `nemovl train`, or one stage's own folder.

    Returns:
        What is there; see `Run.problems` for what could not be read.
    """
    folder = folder.resolve()
    if (folder / "metrics.jsonl").is_file():
        return _read_single_stage(folder)
    reader = Reader(folder)
    schedule = reader.json(folder / "schedule.json", dict)
    listed = schedule.get("stages")
    entries = [entry for entry in listed if _is_entry(entry)] if isinstance(listed, list) else []
    if entries:
        stages = [_read_stage(reader, folder / entry["name"], entry) for entry in entries]
    else:
        found = [_read_stage(reader, path.parent, {}) for path in sorted(folder.glob("*/metrics.jsonl"))]
        stages = sorted(found, key=lambda s: (s.started if math.isfinite(s.started) else math.inf, s.name))
    parts = [_read_stage(reader, path.parent, {}) for path in sorted((folder / "parts").rglob("metrics.jsonl"))]
    return Run(
        folder=folder,
        stages=_with_short_names(stages),
        parts=parts,
        environment=reader.json(folder / "environment.json", dict),
        verification=reader.json(folder / "hf" / "verification.json", dict),
        evaluations={path.stem: reader.json(path, dict) for path in sorted((folder / "evaluations").glob("*.json"))},
        problems=reader.problems,
    )


def _read_single_stage(folder: Path) -> Run:
    reader = Reader(folder.parent)
    stage = _read_stage(reader, folder, {})
    environment = reader.json(folder.parent / "environment.json", dict)
    return Run(folder, [stage], [], environment, {}, {}, reader.problems)


def _is_entry(entry: Any) -> bool:
    """Whether a stage of a schedule names a folder of the run, and not one elsewhere."""
    name = entry.get("name") if isinstance(entry, dict) else None
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _read_stage(reader: Reader, folder: Path, entry: dict[str, Any]) -> Stage:
    rows, events = reader.lines(folder / "metrics.jsonl"), reader.lines(folder / "events.jsonl")
    predictions = reader.json(folder / "predictions.json", list)
    name = folder.relative_to(reader.root).as_posix()
    parents = [event["parent"] for event in events if event.get("parent")]
    return Stage(
        name=name.removeprefix("parts/"),
        state=str(entry.get("state") or _state(rows, events)),
        recipe=str(entry.get("recipe") or ""),
        parent=str(entry.get("parent") or (parents[-1] if parents else "")),
        rows=rows,
        events=events,
        validations=reader.lines(folder / "validation.jsonl"),
        evaluation=reader.json(folder / "evaluation.json", dict),
        predictions=[p for p in predictions if isinstance(p, dict)],
        config=reader.yaml(folder / "config.yaml"),
        checkpoints=_checkpoints(folder / "checkpoints"),
        folder=folder,
        short=folder.name,
    )


def _with_short_names(stages: list[Stage]) -> list[Stage]:
    """Name stages by their first word, unless two of them would be the same."""
    words = [stage.name.split("_")[0] for stage in stages]
    if len(set(words)) < len(words) or not all(words):
        return stages
    return [replace(stage, short=word) for stage, word in zip(stages, words, strict=True)]


def _state(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    """State without a schedule: a stage is done when its last start was followed by an end."""
    kinds = [event.get("event") for event in events]
    if "end" in kinds and "start" not in kinds[kinds.index("end") :]:
        return DONE
    return RUNNING if rows or kinds else PENDING


def _checkpoints(folder: Path) -> list[Checkpoint]:
    found = []
    for path in sorted(folder.glob("step_*")):
        try:
            num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        except FileNotFoundError:  # retention removed it while we looked
            continue
        found.append(Checkpoint(path.name, (path / "COMPLETE").is_file(), num_bytes))
    return found
