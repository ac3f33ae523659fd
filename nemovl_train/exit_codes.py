"""What the `nemovl` command's exit status means. Schedulers and scripts may rely on these numbers."""

import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from nemovl_train.exceptions import ConfigError, RunFailedError, UserError

EXIT_FILE = "NEMOVL_EXIT_FILE"
"""Environment variable of a launcher that cannot pass exit codes on: the file that receives the code instead."""


class ExitCode(IntEnum):
    """Exit status of every verb.

    Attributes:
        OK: Done. A schedule or stage that had nothing left to do also ends with this code and says so, so that a
            requeue loop stops.
        FAILED: Something went wrong that is not the user's input.
        USAGE: Bad usage, config or input; the message says what to type next.
        REQUEUE: The state was saved because a stop was asked for; start the same command again to go on.
            75 is EX_TEMPFAIL of sysexits.h: try again later.
        INTERRUPTED: Ctrl-C before anything could be saved (128 + SIGINT).
    """

    OK = 0
    FAILED = 1
    USAGE = 2
    REQUEUE = 75
    INTERRUPTED = 130


def guarded(call: Callable[[], int]) -> int:
    """Runs a verb and turns what it raises into an exit code and one readable message on stderr.

    Under a launcher that asked for it (`EXIT_FILE`), the first process of a node writes the code to a file, and a
    process that saved and wants to be started again ends with 0: torchrun would take anything else for a crash, kill
    its neighbours while they save, and report 1.
    """
    target = os.environ.get(EXIT_FILE)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if target and first:
        # Processes that torchrun starts again must not be taken for those before them, should they be killed.
        Path(target).unlink(missing_ok=True)
    code = _caught(call)
    if not target:
        return code
    if first:
        Path(target).write_text(f"{int(code)} {os.environ.get('RANK', '0')}", encoding="utf-8")
    return ExitCode.OK if code == ExitCode.REQUEUE else code


def read_exit_file(path: Path) -> tuple[int, int] | None:
    """The code that a process left and the process's rank; None when it ended before it could."""
    try:
        code, rank = path.read_text(encoding="utf-8").split()
        return int(code), int(rank)
    except (OSError, ValueError):
        return None


def _caught(call: Callable[[], int]) -> int:
    try:
        return int(call())
    except UserError as error:
        # All processes of a run compose the same config: one of them is enough to say what is wrong with it.
        if not (isinstance(error, ConfigError) and os.environ.get("RANK", "0") != "0"):
            print(f"{_rank()}error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except RunFailedError as error:
        print(f"{_rank()}error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print(f"{_rank()}interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # `nemovl recipes list | head`: the reader has seen enough. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Exception:
        traceback.print_exc()
        return ExitCode.FAILED


def _rank() -> str:
    return f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
