"""Steps whose loss or gradient norm is far outside the recent ones change nothing.

The rule is OLMo-core's `SkipStepOptimizer`: mean plus a number of standard deviations over the last 128 steps. It
looks at numbers that the step brings to the host anyway, so it costs no synchronisation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

WINDOW = 128


def limit(recent: Sequence[float], sigma: float, *, least: int = WINDOW // 2) -> float:
    """Largest value that is no spike.

    Args:
        recent: Values of the last steps that were taken.
        sigma: Standard deviations above the mean; 0 allows everything.
        least: With fewer values than this, everything is allowed.
    """
    if not sigma or len(recent) < least:
        return math.inf
    return statistics.fmean(recent) + sigma * statistics.pstdev(recent)


def remember(recent: list[float], value: float | None) -> None:
    """Append a step's value and forget the oldest."""
    if value is not None:
        recent.append(value)
        del recent[:-WINDOW]
