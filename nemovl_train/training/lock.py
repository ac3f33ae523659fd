"""One process group at a time in a stage's folder: two would remove each other's half-written checkpoints.

`flock` says it at once on one machine, and on file systems that pass it on; a heartbeat in the file says it elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from nemovl_train.exceptions import CheckpointError

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
_BEAT_BYTES = 512
STALE_BEATS = 4
"""A holder that missed this many heartbeats is taken for dead."""


class FolderLock:
    """Holds `FOLDER/.lock` until `release`, or until the process ends, however that happens.

    The file stays when the lock goes: removing it could take the lock away from a process that opened it already.

    Args:
        folder: An existing folder.

    Raises:
        CheckpointError: Another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        self._over = threading.Event()
        try:
            self._claim(folder)
        except BaseException:
            self._file.close()
            raise
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others in."""
        self._over.set()
        self._thread.join()
        self._file.truncate(0)
        self._file.close()

    def _claim(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(folder, self._holder()) from error
        except OSError as error:
            # Some shared file systems have no locks; then the heartbeat is all there is.
            log.warning("%s cannot be locked (%s): start no second run in it", folder, error.strerror)
        holder = self._holder()
        # On this machine flock knows better: it frees the file with the process.
        if holder is None or holder.get("host") == socket.gethostname():
            return
        log.warning("%s was in use by %s; waiting for its next sign of life", folder, _name(holder))
        for _ in range(STALE_BEATS):
            time.sleep(BEAT_SECONDS)
            if self._holder() != holder:
                raise _in_use(folder, self._holder())
        log.warning("%s gave none in %.0f s: taking the folder over", _name(holder), STALE_BEATS * BEAT_SECONDS)

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _beat(self) -> None:
        job = os.environ.get("SLURM_JOB_ID", "")
        beat = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "time": time.time()}
        # One write of one length: a reader sees the old or the new one.
        os.pwrite(self._file.fileno(), json.dumps(beat).ljust(_BEAT_BYTES).encode(), 0)

    def _keep_beating(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._beat()
            except OSError as error:
                log.warning("%s: no sign of life could be written (%s)", self.path, error.strerror)


def _name(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid')} on {holder.get('host')}"


def _in_use(folder: Path, holder: dict[str, Any] | None) -> CheckpointError:
    by = "another process" if holder is None else f"another process ({_name(holder)})"
    return CheckpointError(
        f"{folder} is in use by {by}: wait until it ends, or stop it; then run the same command again"
    )
