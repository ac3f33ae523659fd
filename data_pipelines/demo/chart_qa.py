"""Questions on bar charts and small tables, with exact answers."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data_pipelines.demo.fonts import font
from data_pipelines.demo.keyed import draw_in_split, keyed_random
from data_pipelines.demo.records import Sample, image_sample, sample_id

NAME = "chart_qa"
QUESTIONS = {
    "highest": ("Which {item} has the highest value?", "Which {item} is the largest?"),
    "lowest": ("Which {item} has the lowest value?", "Which {item} is the smallest?"),
    "value": ("What is the value of {label}?", "How much is {label}?"),
    "count": ("How many {item}s are there?", "Count the {item}s."),
}
LABELS = "ABCDEFGH"
MAX_VALUE = 9
_BARS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189))
_WHITE, _BLACK, _GREY = (255, 255, 255), (20, 20, 20), (150, 150, 150)


@dataclass(frozen=True)
class Chart:
    """A chart's content: distinct `values` (1 to 9) by single-letter `labels`, as a `bar` chart or a `table`."""

    kind: str
    labels: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def item(self) -> str:
        """What one entry is called in a question."""
        return "bar" if self.kind == "bar" else "row"


def generate(seed: int, count: int, split: str) -> Iterator[Sample]:
    """Bar charts (64 x 64 or 128 x 64) and tables (64 x 64) with one question each."""
    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        chart = draw_in_split(rng, split, draw_chart)
        question, answer = ask(chart, rng)
        yield image_sample(sample_id(NAME, split, index), [render(chart, rng)], question, answer)


def draw_chart(rng: random.Random) -> Chart:
    """Random content; values are distinct so that highest and lowest are."""
    kind = rng.choice(("bar", "bar", "table"))
    size = rng.randint(2, 5 if kind == "bar" else 4)
    labels = tuple(rng.sample(LABELS, size)) if kind == "table" else tuple(LABELS[:size])
    return Chart(kind, labels, tuple(rng.sample(range(1, MAX_VALUE + 1), size)))


def ask(chart: Chart, rng: random.Random) -> tuple[str, str]:
    """A question about the chart and its exact answer."""
    kind = rng.choice(tuple(QUESTIONS))
    by_label = dict(zip(chart.labels, chart.values, strict=True))
    label = rng.choice(chart.labels)
    answers = {
        "highest": max(by_label, key=by_label.__getitem__),
        "lowest": min(by_label, key=by_label.__getitem__),
        "value": str(by_label[label]),
        "count": str(len(by_label)),
    }
    return rng.choice(QUESTIONS[kind]).format(item=chart.item, label=label), answers[kind]


def render(chart: Chart, rng: random.Random) -> Image.Image:
    """Draws the chart (mode RGB, 64 px high)."""
    return _bars(chart, rng) if chart.kind == "bar" else _table(chart)


def _bars(chart: Chart, rng: random.Random) -> Image.Image:
    width = 128 if rng.random() < 0.3 else 64
    canvas = Image.new("RGB", (width, 64), _WHITE)
    pen = ImageDraw.Draw(canvas)
    step, colour = width / len(chart.values), rng.choice(_BARS)
    for position, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        left, right = round((position + 0.2) * step), round((position + 0.8) * step)
        top = 52 - value * 4
        pen.rectangle((left, top, right - 1, 52), fill=colour)
        middle = (left + right) / 2
        pen.text((middle, 53), label, fill=_BLACK, font=font("DejaVuSans", 10), anchor="ma")
        pen.text((middle, top - 1), str(value), fill=_BLACK, font=font("DejaVuSans", 9), anchor="mb")
    pen.line((0, 52, width, 52), fill=_GREY)
    return canvas


def _table(chart: Chart) -> Image.Image:
    canvas = Image.new("RGB", (64, 64), _WHITE)
    pen = ImageDraw.Draw(canvas)
    row = 64 // len(chart.values)
    for position, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        middle = position * row + row / 2
        pen.text((16, middle), label, fill=_BLACK, font=font("DejaVuSans", 14), anchor="mm")
        pen.text((48, middle), str(value), fill=_BLACK, font=font("DejaVuSans", 14), anchor="mm")
        pen.line((0, (position + 1) * row - 1, 64, (position + 1) * row - 1), fill=_GREY)
    pen.line((32, 0, 32, 64), fill=_GREY)
    return canvas
