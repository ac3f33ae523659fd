"""The file of nodes that jobs leave out: one name a line, with the day and the reason as a remark."""

import fcntl
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)


def add_excluded(path: Path, bad: Mapping[str, Sequence[str]]) -> list[str]:
    """Add nodes that are not in the file yet. Several runs may share the file, and people edit it.

    Args:
        path: The file; made with its folder when it is missing.
        bad: Reasons by name; the first one is written down.

    Returns:
        The names that were added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some shared file systems have no locks. Then two runs may at worst add the same node.
            log.warning("%s cannot be locked: %s", path, error.strerror)
        file.seek(0)
        known = file.read()
        names = {line.partition("#")[0].strip() for line in known.splitlines()}
        stamp = time.strftime("%Y-%m-%d")
        new = [name for name in bad if name not in names]
        # The end of a file that was written by hand may be a line without its end.
        start = "\n" if known and not known.endswith("\n") else ""
        file.write(start + "".join(f"{name}  # {stamp} {bad[name][0]}\n" for name in new) if new else "")
    return new
