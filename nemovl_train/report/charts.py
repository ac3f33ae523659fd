"""Line charts as inline SVG, drawn for any width: the plot stretches, while text and stroke widths do not.

Stages follow one another on one axis of steps. Raw values are faint points; the line over them is an exponential
average. Labels are HTML placed in percent, because text inside a stretched SVG would be distorted, and text inside a
scaled one unreadable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from nemovl_train.report.formats import decimal, tick

MAX_POINTS = 400
MAX_MARKS = 50
WIDTH, HEIGHT = 1000.0, 400.0


@dataclass(frozen=True)
class Line:
    """One stage of a chart.

    Attributes:
        name: Stage.
        hue: Index of the stage's colour.
        steps: Step of each value, counted inside the stage.
        values: Numbers; NaN or infinity makes a gap and a mark on the axis.
        extent: Steps that the stage takes up on the axis; more than `steps` hold while it runs.
    """

    name: str
    hue: int
    steps: Sequence[float]
    values: Sequence[float]
    extent: float


@dataclass(frozen=True)
class Scale:
    """A vertical axis: bounds, in log10 when `log`, and the values that get a grid line."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Height of a value as a share of the axis, 0 at the bottom."""
        at = math.log10(value) if self.log else value
        return min(1.0, max(0.0, (at - self.low) / (self.high - self.low)))


def nice_ticks(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose `low` and `high`."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten between two positive numbers, with 2 and 5 between them, or evenly spaced, in shorter ranges."""
    if high < 3 * low:
        return tuple(t for t in nice_ticks(low, high) if low <= t <= high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, len(decades) // 6)
    factors = (1, 2, 5) if high < 300 * low else (1,)
    return tuple(t for d in decades[::stride] for f in factors if low <= (t := f * 10.0**d) <= high)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential average over about a twentieth of the values, unbiased at the start; NaN keeps the last average."""
    decay = 1 - 2 / (max(3.0, min(100.0, len(values) / 20)) + 1)
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight if weight else math.nan)
    return averages


def thin_out(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` finite values: the lowest and highest of each bucket, so that spikes stay visible."""
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    if len(finite) <= most:
        return finite
    buckets = max(1, most // 2)
    edges = [len(finite) * b // buckets for b in range(buckets + 1)]
    kept = set()
    for start, stop in pairwise(edges):
        bucket = finite[start:stop]
        kept |= {min(bucket, key=values.__getitem__), max(bucket, key=values.__getitem__)}
    return sorted(kept)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    show: Callable[[float], str] = decimal,
    label: Callable[[float], str] = tick,
    log: bool = False,
    bounds: tuple[float | None, float | None] = (None, None),
    averaged: bool = True,
) -> Markup:
    """Draw stages side by side.

    Args:
        lines: One per stage, in order.
        title: What is drawn, with its unit.
        show: Writes a value for a tooltip.
        label: Writes a value for the axis.
        log: Logarithmic axis; values that are not positive are left out.
        bounds: Fixed lower and upper end of the axis.
        averaged: Draw an average over faint points; otherwise a line through the values.

    Returns:
        A `<figure>`, escaped.
    """
    total = sum(line.extent for line in lines) or 1.0
    drawn = [_drop_non_positive(line) for line in lines] if log else list(lines)
    scale = _scale([v for line in drawn for v in line.values if math.isfinite(v)], log, bounds)
    body, names, offset = Markup(), Markup(), 0.0
    for line in drawn:
        body += _draw(line, offset, total, scale, show=show, averaged=averaged)
        names += _stage_name(line, offset, total)
        offset += line.extent
    grid = "".join(f"M0 {HEIGHT * (1 - scale.share(value)):.1f}H{WIDTH:.0f}" for value in scale.ticks)
    labels = _axis_labels(scale, total, label)
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption><div class="frame"><div class="names">{}</div>'
        '<div class="plot"><svg viewBox="0 0 {:.0f} {:.0f}" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<path class="grid" d="{}"></path>{}</svg>{}</div></div></figure>'
    ).format(title, names, WIDTH, HEIGHT, f"{title} over steps", grid, body, labels)


def _axis_labels(scale: Scale, total: float, label: Callable[[float], str]) -> Markup:
    """Values beside the plot and steps below it."""
    y, x = (
        Markup('<span class="y" style="top:{:.2f}%">{}</span>'),
        Markup('<span class="x" style="left:{:.2f}%">{}</span>'),
    )
    values = [y.format(100 * (1 - scale.share(value)), label(value)) for value in scale.ticks]
    steps = [x.format(100 * step / total, tick(step)) for step in nice_ticks(0, total, 4) if step <= total]
    return Markup().join([*values, *steps])


def _drop_non_positive(line: Line) -> Line:
    values = [value if value > 0 or not math.isfinite(value) else math.nan for value in line.values]
    return Line(line.name, line.hue, line.steps, values, line.extent)


def _scale(values: list[float], log: bool, bounds: tuple[float | None, float | None]) -> Scale:
    """An axis that holds all values; one from 0 to 1 where there are none."""
    if log and values:
        low, high = min(values), max(values)
        pad = 0.05 * math.log10(high / low) if high > low else 0.1
        low, high = low * 10**-pad, high * 10**pad
        return Scale(math.log10(low), math.log10(high), log_ticks(low, high), log=True)
    low = min(values, default=0.0) if bounds[0] is None else bounds[0]
    high = max(values, default=1.0) if bounds[1] is None else bounds[1]
    ticks = nice_ticks(low, high)
    return Scale(ticks[0], ticks[-1], ticks)


def _stage_name(line: Line, offset: float, total: float) -> Markup:
    return Markup('<span class="stage-{}" style="left:{:.2f}%;width:{:.2f}%">{}</span>').format(
        line.hue, 100 * offset / total, 100 * line.extent / total, line.name
    )


def _draw(
    line: Line, offset: float, total: float, scale: Scale, *, show: Callable[[float], str], averaged: bool
) -> Markup:
    """Boundary, points, line, marks and tooltips of one stage."""

    def x(index: int) -> float:
        return WIDTH * (offset + line.steps[index]) / total

    def y(value: float) -> float:
        return HEIGHT * (1 - scale.share(value))

    kept = thin_out(line.values, max(2, int(MAX_POINTS * line.extent / total)))
    averages = smooth(line.values) if averaged else line.values
    curve = "L".join(f"{x(i):.1f} {y(averages[i]):.1f}" for i in kept)
    points = "".join(f"M{x(i):.1f} {y(line.values[i]):.1f}h0" for i in kept) if averaged else ""
    missing = [i for i, value in enumerate(line.values) if not math.isfinite(value)]
    marks = "".join(f"M{x(i):.1f} {HEIGHT:.0f}v-24" for i in missing[:MAX_MARKS])
    parts = [("points", points), ("curve", f"M{curve}" if kept else ""), ("mark", marks)]
    if offset:
        parts.insert(0, ("boundary", f"M{WIDTH * offset / total:.1f} 0V{HEIGHT:.0f}"))
    paths = Markup().join(Markup('<path class="{}" d="{}"></path>').format(name, d) for name, d in parts if d)
    hits = Markup().join(
        Markup('<rect x="{:.1f}" y="0" width="{:.1f}" height="{:.0f}"><title>{}</title></rect>').format(
            left, max(0.1, right - left), HEIGHT, _tooltip(line, i, averages[i], show, averaged=averaged)
        )
        for i, (left, right) in zip(kept, _columns([x(i) for i in kept]), strict=True)
    )
    return Markup('<g class="stage-{}">{}{}</g>').format(line.hue, paths, hits)


def _tooltip(line: Line, index: int, average: float, show: Callable[[float], str], *, averaged: bool) -> str:
    text = f"{line.name}, step {line.steps[index]:.0f}: {show(line.values[index])}"
    return f"{text} (average {show(average)})" if averaged else text


def _columns(centres: Sequence[float]) -> list[tuple[float, float]]:
    """Left and right end of the column around each point, meeting half-way."""
    middles = [(a + b) / 2 for a, b in pairwise(centres)]
    return list(zip([*centres[:1], *middles], [*middles, *centres[-1:]], strict=True))
