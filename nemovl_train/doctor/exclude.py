"""The file of nodes that jobs leave out: one name a line, with the day and the reason as a remark."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def add_excluded(path: Path, bad: Mapping[str, Sequence[str]]) -> list[str]:
    """Add nodes that are not in the file yet.

    Args:
        path: The file; made with its folder when it is missing.
        bad: Reasons by name; the first one is written down.

    Returns:
        The names that were added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    names = {line.partition("#")[0].strip() for line in known.splitlines()}
    stamp = time.strftime("%Y-%m-%d")
    new = [name for name in bad if name not in names]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{name}  # {stamp} {bad[name][0]}\n" for name in new)
    return new
