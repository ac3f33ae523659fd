"""Files of a dataset folder, local or behind an fsspec URL, and reads that do not wait for ever."""

import io
import logging
import os
import posixpath
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from data_pipelines.config import ReadConfig
from data_pipelines.exceptions import DataError

logger = logging.getLogger(__name__)

_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Errors that another attempt does not mend."""


class Storage:
    """A folder by path or URL. Safe to pickle into a worker process.

    Attributes:
        url: As it was given.
    """

    _MAX_OPEN_FILES = 64

    def __init__(self, url: str) -> None:
        """Find the file system; nothing is read.

        Args:
            url: A local path, or a URL that fsspec knows (`s3://`, `gs://`, `https://`, `simplecache::...`).

        Raises:
            DataError: The URL's protocol is unknown, or its driver is not installed.
        """
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise DataError(f"{url}: {error}; give a local folder, or install what reads this protocol") from error
        self._local = isinstance(self._fs, LocalFileSystem)
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def path(self, name: str) -> str:
        """Place of a file as the file system names it."""
        return posixpath.join(self._root, name)

    def read(self, name: str) -> bytes:
        """A whole file."""
        return self._ask(lambda: self._fs.cat_file(self.path(name)))

    def open(self, name: str) -> io.BufferedIOBase:
        """A file to seek and read in."""
        file = self._ask(lambda: self._fs.open(self.path(name), "rb"))
        return file if self._local else _AskedFile(file, self._ask)

    def local(self, name: str) -> str | None:
        """Path of a file that lies on this machine, to map into memory."""
        return self.path(name) if self._local else None

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """Bytes of each file, None where it is missing; one listing where files are not local."""
        if self._local:
            return {name: self._local_size(name) for name in names}
        try:
            listed = {posixpath.basename(e["name"]): e["size"] for e in self._ask(lambda: self._fs.ls(self._root))}
        except OSError:
            listed = {}
        # A plain web server has no listing, or one without sizes; it is asked file by file.
        return {name: listed.get(name) or self._remote_size(name) for name in names}

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Part of a file."""
        if not self._local:
            return self._ask(lambda: self._fs.cat_file(self.path(name), start=offset, end=offset + size))
        files = self._files  # opening may outlast `forget`: what it gives then belongs to the table of before
        if name not in files:
            if len(files) >= self._MAX_OPEN_FILES:
                os.close(files.popitem(last=False)[1])
            files[name] = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        files.move_to_end(name)
        return os.pread(files[name], size, offset)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Parts of files (name, offset, size), together where storage is remote; None for one that failed."""
        if self._local:
            return [self.read_range(*part) for part in ranges]
        names, offsets, sizes = zip(*ranges, strict=True)
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        places = [self.path(name) for name in names]
        found = self._ask(lambda: self._fs.cat_ranges(places, list(offsets), ends, on_error="return"))
        return [data if isinstance(data, bytes) else None for data in found]

    def forget(self) -> None:
        """Start with fresh file handles, and leave those that a stalled read may still use."""
        self._files = OrderedDict()
        if not self._local:
            self._fs.invalidate_cache()

    def close(self) -> None:
        """Close the open files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _ask[T](self, question: Callable[[], T]) -> T:
        """Drivers of object stores raise what they like; to the rest of the data side it is an OSError."""
        try:
            return question()
        except OSError:
            raise
        except Exception as error:
            if self._local:
                raise
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _local_size(self, name: str) -> int | None:
        try:
            return os.stat(self.path(name)).st_size
        except OSError:
            return None

    def _remote_size(self, name: str) -> int | None:
        try:
            return self._ask(lambda: self._fs.size(self.path(name)))
        except FileNotFoundError:
            return None


class _AskedFile(io.BufferedIOBase):
    """A remote file whose driver's errors are OSErrors."""

    def __init__(self, file: Any, ask: Callable[[Callable[[], Any]], Any]) -> None:
        self._file, self._ask = file, ask

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._ask(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1) -> bytes:
        return self._ask(lambda: self._file.read(-1 if size is None else size))

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class PatientReader:
    """Runs reads in a thread of its own, gives up on one that stalls and tries again.

    A read that hangs in the kernel (a network mount whose server is gone) cannot be interrupted, only abandoned: its
    thread is left behind, a daemon, and the next read gets a new one.
    """

    def __init__(self, config: ReadConfig, storage: Storage) -> None:
        self._config, self._storage = config, storage
        self._inbox: queue.SimpleQueue[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inbox": None}

    def __del__(self) -> None:
        self.close()

    def call[T](self, what: str, read: Callable[[], T], *, attempts: int | None = None) -> T:
        """The result of `read`, tried as often as the config says, or as `attempts` does.

        Raises:
            DataError: Every attempt failed or stalled, or the file is not there; the last reason is named.
        """
        reason = ""
        attempts = attempts or self._config.attempts
        for attempt in range(attempts):
            if attempt:
                time.sleep(min(1.0, 0.1 * 2**attempt))
            outcome = self._run(read)
            if outcome is None:
                reason = f"no answer within {self._config.timeout_s:g} s"
                self.close()  # the thread ends with its read, should that ever end
                self._storage.forget()
            elif outcome[1] is None:
                return outcome[0]
            elif not isinstance(outcome[1], OSError | pa.ArrowException):
                raise outcome[1]
            else:
                reason = f"{type(outcome[1]).__name__}: {outcome[1]}"
                if isinstance(outcome[1], _LASTING):
                    break
            logger.warning("reading %s, attempt %d of %d: %s", what, attempt + 1, attempts, reason)
        raise DataError(f"{what} cannot be read: {reason} (attempts: {attempt + 1})")

    def close(self) -> None:
        """Let the thread end."""
        if self._inbox is not None:
            self._inbox.put(None)
            self._inbox = None

    def _run(self, read: Callable[[], Any]) -> tuple[Any, Exception | None] | None:
        if self._inbox is None:
            self._inbox = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._inbox,), name="reader", daemon=True).start()
        answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._inbox.put((read, answer))
        try:
            return answer.get(timeout=self._config.timeout_s)
        except queue.Empty:
            return None


def _serve(inbox: "queue.SimpleQueue[Any]") -> None:
    while (job := inbox.get()) is not None:
        read, answer = job
        try:
            answer.put((read(), None))
        except Exception as error:  # whatever it is belongs to the caller
            answer.put((None, error))
        del job, read, answer
