"""Numbers as people read them. Every function takes NaN for "not known" and answers with a dash."""

import math
from datetime import UTC, datetime
from typing import Any

UNKNOWN = "-"


def number(value: Any) -> float:
    """The value as a float; NaN for anything that is not a number, such as a null in a metrics row."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def count(value: float) -> str:
    """A count with at most four digits: 4,864 or 12.3 k or 1.93 M."""
    if not math.isfinite(value):
        return UNKNOWN
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if unit == "k" else size)
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f} {unit}"
    return f"{value:,.0f}"


def decimal(value: float) -> str:
    """Three significant digits without an exponent where that stays short: 0.412, 5.31, 128, 2.1e-05."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 2 if value == 0 else 2 - math.floor(math.log10(abs(value)))
        return f"{value:.{min(5, max(0, digits))}f}"
    return f"{value:.1e}"


def tick(value: float) -> str:
    """An axis label, as short as the number allows: 2e-4, 0.25, 500, 7.5k, 2M."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.6g}{unit}"
    if 0 < abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def percent(value: float) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else UNKNOWN


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `8 min 12 s`, `3 h 05 min` or `2 d 04 h`."""
    if not math.isfinite(seconds):
        return UNKNOWN
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def moment(seconds: float) -> str:
    """Unix time as a date and time in UTC, so that a report reads the same everywhere."""
    if not math.isfinite(seconds):
        return UNKNOWN
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return UNKNOWN


def clip(text: str, limit: int) -> str:
    """A text of at most `limit` characters that keeps its beginning and its end, where a question usually is."""
    if len(text) <= limit:
        return text
    head, tail = limit // 3, limit - limit // 3 - 5
    return f"{text[:head].rstrip()} ... {text[-tail:].lstrip()}"
