"""`nemovl watch RUN`: what a run is doing now, read from the ends of its files. Writes nothing.

Works while the run trains, on another machine that sees the folder, and after the run.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemovl_train.exceptions import UserError

TAIL_BYTES = 256 * 1024
QUIET_SECONDS = 300
STRAGGLER = 1.15
"""A rank this much busier than the median is named."""
_BARS = "".join(chr(code) for code in range(0x2581, 0x2589))
"""Unicode's blocks of one to eight eighths of a line."""
_GIB = 2**30


@dataclass(kw_only=True)
class View:
    """One moment of a run; None where its files do not say.

    Attributes:
        run: Folder of the run.
        stages: Name and state (`pending`, `running`, `done`) of every stage.
        stage: The stage that wrote last.
        step: Steps done in it.
        steps: Steps that it has.
        loss: Of the last step.
        losses: Of the last steps, oldest first.
        source_loss: By source, the last value of each.
        lr: Learning rate.
        grad_norm: Before clipping.
        tokens_per_second: Useful ones, median of the last steps.
        mfu: Likewise.
        fill: Likewise.
        step_seconds: Likewise, without waiting for data.
        data_share: Share of the time that rank 0 waited for data.
        memory_gib: Most of any rank.
        data_rank: Rank that waited longest for data, and its seconds.
        straggler: Rank that was busy longest, and its share of the median rank's time.
        seconds_left: Of the stage.
        quiet_seconds: Since the last line.
        checkpoint: Newest complete checkpoint.
        skipped: Steps of the last ones that changed nothing.
        events: The last events, newest last.
    """

    run: str
    stages: list[tuple[str, str]] = field(default_factory=list)
    stage: str = ""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    source_loss: dict[str, float] = field(default_factory=dict)
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    fill: float | None = None
    step_seconds: float | None = None
    data_share: float | None = None
    memory_gib: float | None = None
    data_rank: tuple[int, float] | None = None
    straggler: tuple[int, float] | None = None
    seconds_left: float | None = None
    quiet_seconds: float | None = None
    checkpoint: str = ""
    skipped: int = 0
    events: list[str] = field(default_factory=list)


def look(folder: Path, *, now: float | None = None) -> View:
    """Reads a run's folder, or a stage's.

    Args:
        folder: `runs/NAME` or `runs/NAME/STAGE`.
        now: Unix time; the present when None.

    Raises:
        UserError: No run is there.
    """
    metrics = [folder / "metrics.jsonl"] if (folder / "metrics.jsonl").is_file() else []
    metrics = metrics or [*folder.glob("*/metrics.jsonl"), *folder.glob("parts/*/metrics.jsonl")]
    stages = list(_stages(folder))
    if not metrics and not stages:
        raise UserError(f"{folder}: no run writes here yet; give its folder, such as runs/NAME")
    view = View(run=str(folder), stages=stages)
    if not metrics:
        return view
    newest = max(metrics, key=lambda path: path.stat().st_mtime)
    view.stage = newest.parent.relative_to(folder).as_posix() if newest.parent != folder else folder.name
    view.quiet_seconds = max((time.time() if now is None else now) - newest.stat().st_mtime, 0.0)
    _read_steps(view, newest)
    _read_folder(view, newest.parent)
    return view


def _stages(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        record = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        yield from [(str(stage["name"]), str(stage["state"])) for stage in record["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return


def _read_steps(view: View, path: Path) -> None:
    rows = [row for row in tail(path) if isinstance(row.get("step"), int)]
    if not rows:
        return
    last = rows[-1]
    view.step, view.lr, view.grad_norm, view.loss = (
        last["step"],
        last.get("lr"),
        last.get("grad_norm"),
        last.get("loss"),
    )
    view.losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float | int)]
    view.skipped = sum(row.get("applied") is False for row in rows)
    for row in rows:
        view.source_loss |= row.get("source_loss") or {}
    recent = rows[-50:]
    for key in ("tokens_per_second", "mfu", "fill", "step_seconds"):
        values = [row[key] for row in recent if isinstance(row.get(key), float | int)]
        setattr(view, key, statistics.median(values) if values else None)
    waited = sum(row.get("data_seconds", 0.0) for row in recent)
    worked = sum(row.get("step_seconds", 0.0) for row in recent)
    if waited + worked > 0:
        view.data_share = waited / (waited + worked)
        view.seconds_left = (waited + worked) / len(recent)  # of one step; times the steps left, once they are known
    ranks = next((row["ranks"] for row in reversed(rows) if row.get("ranks")), None)
    if ranks:
        _read_ranks(view, ranks)


def _read_ranks(view: View, ranks: dict[str, list[float]]) -> None:
    busy, data, memory = ranks["busy_seconds"], ranks["data_seconds"], ranks["memory_bytes"]
    view.memory_gib = max(memory) / _GIB
    slowest = max(range(len(busy)), key=busy.__getitem__)
    median = statistics.median(busy)
    view.straggler = (slowest, busy[slowest] / median) if median > 0 else None
    hungriest = max(range(len(data)), key=data.__getitem__)
    view.data_rank = (hungriest, data[hungriest])


def _read_folder(view: View, stage: Path) -> None:
    try:
        config = yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8"))
        view.steps = int(config["trainer"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        view.steps = None
    each, view.seconds_left = view.seconds_left, None
    if each is not None and view.steps is not None:
        view.seconds_left = each * max(view.steps - view.step, 0)
    sealed = sorted(path.parent.name for path in (stage / "checkpoints").glob("step_*/COMPLETE"))
    view.checkpoint = sealed[-1] if sealed else ""
    events = [event for event in tail(stage / "events.jsonl") if "event" in event]
    view.events = [_event(event) for event in events[-4:]]


def _event(event: dict[str, Any]) -> str:
    clock = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
    more = {k: v for k, v in event.items() if k not in ("time", "event", "step", "samples", "parent", "hosts")}
    details = " ".join(f"{key}={value}" for key, value in more.items())
    return f"{clock}  step {event.get('step', '?')}  {event['event']} {details}".rstrip()


def tail(path: Path, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """Whole JSON lines from the end of a file; a line that is being written, or damaged, is left out."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - size))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    if end > size:
        lines = lines[1:]
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def watch(folder: Path, *, every: float, once: bool, as_json: bool) -> int:
    """Shows a run until Ctrl-C, or once.

    Args:
        folder: Of the run.
        every: Seconds between two looks.
        once: Print one view and return; also done where the output is no terminal.
        as_json: One JSON document, once.
    """
    view = look(folder)
    if as_json:
        print(json.dumps(asdict(view), indent=1))
        return 0
    console = Console()
    if once or not console.is_terminal:
        console.print(drawn(view))
        return 0
    with Live(drawn(view), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(drawn(look(folder)), refresh=True)


def drawn(view: View) -> Panel:
    """The view as one panel."""
    parts: list[Any] = []
    if view.stages:
        marks = {"done": "green", "running": "bold yellow"}
        line = Text()
        for name, state in view.stages:
            line.append(f"{name} ({state})  ", style=marks.get(state, "dim"))
        parts.append(line)
    if view.stage:
        parts += [_progress(view), _numbers(view)]
    if view.losses:
        parts.append(Text(f"loss {sparkline(view.losses)}"))
    if view.source_loss:
        parts.append(_sources(view))
    parts += [Text(event, style="dim") for event in view.events]
    return Panel(Group(*parts), title=f"nemovl watch {view.run}")


def _progress(view: View) -> Table:
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=view.steps or 1, completed=min(view.step, view.steps or 1), width=30)
    left = "" if view.seconds_left is None else f"{_time(view.seconds_left)} left"
    quiet = ""
    if view.quiet_seconds is not None and view.quiet_seconds > QUIET_SECONDS and view.step != view.steps:
        quiet = f"no line for {_time(view.quiet_seconds)}"
    grid.add_row(view.stage, bar, f"{view.step:,}/{view.steps or '?'}", left, Text(quiet, style="bold red"))
    return grid


def _numbers(view: View) -> Table:
    grid = Table.grid(padding=(0, 3))
    grid.add_row(
        _named("loss", view.loss, "{:.4f}"),
        _named("lr", view.lr, "{:.2e}"),
        _named("grad norm", view.grad_norm, "{:.3f}"),
        _named("skipped", view.skipped, "{}"),
        f"checkpoint {view.checkpoint or 'none'}",
    )
    grid.add_row(
        _named("useful tok/s", view.tokens_per_second, "{:,.0f}"),
        _named("MFU", view.mfu, "{:.1%}"),
        _named("fill", view.fill, "{:.1%}"),
        _named("step", view.step_seconds, "{:.2f} s"),
        _named("waiting for data", view.data_share, "{:.1%}"),
    )
    slow = view.straggler is not None and view.straggler[1] > STRAGGLER
    rank = "" if view.straggler is None else f"rank {view.straggler[0]} {view.straggler[1]:.2f} x median"
    hungry = "" if view.data_rank is None else f"rank {view.data_rank[0]} waits {view.data_rank[1]:.2f} s"
    grid.add_row(
        _named("memory", view.memory_gib, "{:.1f} GiB"),
        Text(f"slowest {rank}" if rank else "", style="bold red" if slow else ""),
        Text(f"data {hungry}" if hungry else ""),
    )
    return grid


def _sources(view: View) -> Table:
    table = Table.grid(padding=(0, 3))
    items = sorted(view.source_loss.items())
    for start in range(0, len(items), 4):
        table.add_row(*(f"{name} {loss:.3f}" for name, loss in items[start : start + 4]))
    return table


def _named(name: str, value: float | None, form: str) -> str:
    return f"{name} {'-' if value is None else form.format(value)}"


def sparkline(values: list[float], width: int = 60) -> str:
    """Values as bars, averaged into at most `width` of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = max(1, math.ceil(len(finite) / width))
    means = [statistics.fmean(finite[i : i + size]) for i in range(0, len(finite), size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[min(int((mean - low) / span * len(_BARS)), len(_BARS) - 1)] for mean in means)


def _time(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.1f} days"
    if hours >= 2:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
