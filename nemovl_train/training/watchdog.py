"""Ends a run that makes no progress, and says where it stands.

A hang has many causes and one look: some rank waits for ever. Collectives have their own, shorter limit
(`parallel.collective_timeout_s`), so that the first to speak is the one that can name the collective.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from nemovl_train.exit_codes import ExitCode

log = logging.getLogger(__name__)

FIRST_STEP_FACTOR = 3
"""Kernels are built and files are opened for the first time: until the first step is done, more time is allowed."""


class Watchdog:
    """A thread that dumps all Python stacks and ends the process when `beat` was not called for too long.

    Args:
        folder: Where `rank_00000.txt` goes.
        rank: This process's rank.
        timeout_s: Longest time between two beats; 0 watches nothing.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float) -> None:
        self.path = folder / f"rank_{rank:05d}.txt"
        self.timeout_s = timeout_s
        self._allowed = timeout_s * FIRST_STEP_FACTOR
        self._look_s = min(1.0, timeout_s / 4)
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_s > 0:
            self._thread.start()

    def beat(self, *, stepped: bool = False) -> None:
        """Something was done. After the first step the time allowed is the usual one."""
        self._last = time.monotonic()
        if stepped:
            self._allowed = self.timeout_s

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._look_s):
            waited = time.monotonic() - self._last
            if waited > self._allowed:
                self._end(waited)

    def _end(self, waited: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        where = collective_in(frame) or "no collective: it waits for data, the disk or the device"
        log.error("no progress for %.0f s; the main thread is in %s; stacks: %s", waited, where, self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w") as file:
                print(f"no progress for {waited:.0f} s; stuck in {where}\n", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        logging.shutdown()
        # All ranks stand still, and see it within one look; the first to leave would end the others before they wrote.
        time.sleep(2.5 * self._look_s)
        # The main thread cannot be asked to leave: it does not come back from where it is.
        os._exit(ExitCode.FAILED)


def collective_in(frame: FrameType | None) -> str | None:
    """The collective that a stack waits in, with the line of ours that called it; None where there is none."""
    name = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith("distributed_c10d.py"):
            name = frame.f_code.co_name
        elif name is not None and f"{os.sep}torch{os.sep}" not in file:
            return f"{name}, called from {Path(file).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return name
