"""Stop requests: noticed by a handler, agreed by all ranks, acted on as soon as no weight is half changed."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context in which a stop signal asks for a save instead of killing the process.

    A second Ctrl-C gets Python's usual treatment, so that impatience still works; schedulers may repeat the others.

    Attributes:
        received: The last signal that this process got; None before the first.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # Launchers forward what the scheduler has already sent: only a second Ctrl-C is impatience.
        if number == signal.SIGINT:
            signal.signal(number, self._previous[self.received])  # type: ignore[arg-type]
