"""Ends a process that would run a stranger's code or open a connection. Used by `reload_check`."""

import os
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".pkl")


def refuse_code_from(folder: Path) -> None:
    """Make every later attempt to open code or pickles of a folder, or a network connection, a PermissionError.

    Transformers runs a folder's code only when asked to; this makes sure of it. It cannot be undone, so it belongs in a
    process of its own.
    """
    root = str(folder.resolve()) + os.sep

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[0], str) and args[0].endswith(FORBIDDEN)
        if opened and os.path.realpath(args[0]).startswith(root):
            raise PermissionError(f"{args[0]} is code or a pickle of the folder under test")
        if event == "socket.connect":
            raise PermissionError(f"a connection to {args[1]} was tried")

    sys.addaudithook(hook)
