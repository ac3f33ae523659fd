"""JSON of strangers: parsed strictly, every failure a ValueError."""

import json
from typing import Any


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON; NaN and infinities, which Python would take, are refused.

    Raises:
        ValueError: Not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
