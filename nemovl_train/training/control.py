"""What the ranks of a run decide together, once a step and wherever one of them waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemovl_train.checkpoint.saving import Saver
from nemovl_train.parallel.agree import on_any_rank
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.deadline import Deadline
from nemovl_train.training.signals import StopRequest
from nemovl_train.training.watchdog import Watchdog

log = logging.getLogger(__name__)

SAVE_FILE = "save_now"
"""Touch this file in the stage's folder to have a checkpoint written after the step in progress."""

_LOOK_SECONDS = 0.05  # a rank that waits for data looks this often at what the others want


@dataclass(frozen=True)
class Wishes:
    """What some rank wants, the same on every rank.

    Attributes:
        stop: Save and leave: a signal came, or the time is nearly over.
        save: A person asked for a checkpoint.
        waiting: Some rank has no data yet.
    """

    stop: bool
    save: bool
    waiting: bool


class Control:
    """Asks all ranks for their wishes, and moves the save in the background on when all of them are ready.

    Args:
        layout: Owner of the group that the ranks agree over.
        folder: The stage's folder.
        stop: Signals that this process got.
        saver: The stage's checkpoints.
        deadline: When the run has to be over.
        watchdog: Told about progress.
        published: Called on every rank with a checkpoint that was just published.
    """

    def __init__(
        self,
        layout: Layout,
        folder: Path,
        *,
        stop: StopRequest,
        saver: Saver,
        deadline: Deadline,
        watchdog: Watchdog,
        published: Callable[[Path], None],
    ) -> None:
        self.layout, self.folder = layout, folder
        self.stop, self.saver, self.deadline, self.watchdog = stop, saver, deadline, watchdog
        self._published = published
        self._told = False

    def ask(self, *, waiting: bool = False) -> Wishes:
        """The wishes of all ranks. Collective."""
        busy = self.saver.busy
        stop = self.stop.received is not None or self._time_is_over()
        save = self.layout.rank == 0 and (self.folder / SAVE_FILE).exists()
        stop, save, waiting, busy = on_any_rank([stop, save, waiting, busy], self.layout.control)
        if not busy and not self.saver.idle:
            self._note(self.saver.advance())
        return Wishes(stop, save, waiting)

    def stopping(self) -> bool:
        """Whether any rank was asked to stop, the same on every rank. Collective."""
        return self.ask().stop

    def wait_for[T](self, get: Callable[[], T]) -> T | None:
        """Something that may take long to come, while the others' wishes are still heard. Collective.

        Args:
            get: Called in a thread of its own.

        Returns:
            Its result; None when the ranks decided to stop before all of them had theirs.
        """
        box: dict[str, Any] = {}

        def fetch() -> None:
            try:
                box["result"] = get()
            except BaseException as error:
                box["error"] = error

        thread = threading.Thread(target=fetch, name="data", daemon=True)
        thread.start()
        while True:
            thread.join(_LOOK_SECONDS)
            waiting = thread.is_alive()
            if not waiting and "error" in box:
                raise box["error"]
            wishes = self.ask(waiting=waiting)
            if wishes.stop:
                return None
            if not wishes.waiting:
                self.watchdog.beat()
                return box["result"]

    def finish_save(self) -> None:
        """Wait until no save is on its way. Collective."""
        self._note(self.saver.finish())
        self.watchdog.beat()

    def clear_save_file(self) -> None:
        """The wish for a checkpoint is granted."""
        if self.layout.rank == 0:
            (self.folder / SAVE_FILE).unlink(missing_ok=True)

    def _note(self, folder: Path | None) -> None:
        if folder is not None:
            self._published(folder)

    def _time_is_over(self) -> bool:
        near = self.layout.rank == 0 and self.deadline.near(self.saver.seconds)
        if near and not self._told:
            self._told = True
            assert self.deadline.at is not None
            log.warning("%.0f s are left: saving now", self.deadline.at - time.time())
        return near
