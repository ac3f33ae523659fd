"""Axes, averages and thinning of the charts."""

import itertools
import math

import pytest
from page import Page

from nemovl_train.report.charts import MAX_POINTS, Line, line_chart, log_ticks, nice_ticks, smooth, thin_out


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (0.3, 4.9, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)),
        (2, 2, (1.8, 1.9, 2.0, 2.1, 2.2)),
    ],
)
def test_nice_ticks(low: float, high: float, expected: tuple[float, ...]) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert all(a < b for a, b in itertools.pairwise(ticks))
    assert ticks == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(1.1, 1.9), (0.2, 9), (1e-6, 1e6), (3, 250)])
def test_log_ticks_lie_inside_and_are_few(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)


def test_average_is_unbiased_and_skips_gaps() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([math.nan, 2.0, math.nan, 2.0])[1:] == pytest.approx([2.0] * 3)
    assert math.isnan(smooth([math.nan])[0])


def test_thinning_keeps_spikes() -> None:
    values = [1.0] * 10_000
    values[4321], values[7777], values[10] = 99.0, -5.0, math.nan
    kept = thin_out(values, 400)
    assert len(kept) <= 400
    assert {4321, 7777} <= set(kept)
    assert 10 not in kept
    assert thin_out([1.0, math.inf, 2.0], 400) == [0, 2]


def test_points_are_bounded_over_all_stages() -> None:
    lines = [Line(f"s{i}", i, range(1, 5001), [1.0 + k % 7 for k in range(5000)], 5000) for i in range(5)]
    page = Page(str(line_chart(lines, title="Loss")))
    assert len(page.all("rect")) <= MAX_POINTS
    assert len(page.all("path", "boundary")) == 4


def test_names_are_escaped() -> None:
    chart = line_chart([Line("<i>&", 0, [1, 2], [0.5, 0.25], 2)], title='"<b>"')
    page = Page(str(chart))
    assert not page.all("i")
    assert not page.all("b")
    assert "<i>&" in page.words


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [-1.0, 0.0]])
@pytest.mark.parametrize("log", [False, True])
def test_nothing_to_draw(values: list[float], log: bool) -> None:
    lines = [Line("s", 0, range(1, len(values) + 1), values, max(1, len(values)))]
    Page(str(line_chart(lines, title="Loss", log=log)))
    Page(str(line_chart([], title="Loss", log=log)))


def test_axis_of_a_running_stage_reaches_its_last_step() -> None:
    page = Page(str(line_chart([Line("s", 0, [1, 2], [1.0, 2.0], 100)], title="Loss")))
    assert float(page.all("rect")[-1]["x"]) < 30
