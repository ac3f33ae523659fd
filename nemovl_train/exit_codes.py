"""What the `nemovl` command's exit status means. Schedulers and scripts may rely on these numbers."""

import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum

from nemovl_train.exceptions import ConfigError, RunFailedError, UserError


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
    """Runs a verb and turns what it raises into an exit code and one readable message on stderr."""
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
