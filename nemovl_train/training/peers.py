"""Ends a process whose peer has died while it waits for that peer on a device.

A collective of gloo fails at once when a peer's connection closes. One of NCCL does not: the process waits in the
driver, where neither an error nor a signal reaches Python, until the collective's own limit. So every process also
holds a plain connection to the first one, and a thread that reads it: the kernel closes the connections of a process
that ends, however it ends.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

import torch.distributed as dist

from nemovl_train.exit_codes import ExitCode

log = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0
"""How long the main thread has to notice by itself, which lets it say more, after a process has died."""
FAIL_SECONDS = 60.0
"""The same after a process has left with an error: this one may be leaving with it too, and be closing what is open."""

_BYE, _LOST, _FAILED = b"b", b"l", b"f"
_CONNECT_SECONDS = 20.0
_WORD_SECONDS = 2.0  # a stranger that says nothing must not keep the watching thread
_LINGER_SECONDS = 10.0  # for the good-byes of others
# A host that is gone closes nothing: after a minute of silence it is asked every 15 s, and lost after four questions.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Stages that follow each other in the same processes share their store.
_NUMBERS = itertools.count()


class PeerWatch:
    """Context in which the end of any process of the run ends this one. Every process enters it.

    Args:
        rank: This process's rank.
        world_size: Processes of the run; with one there is nothing to watch.
        store: Where they meet; None watches nothing.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store | None) -> None:
        self.rank = rank
        self._store = store if world_size > 1 else None
        # The first process may have worked alone before the others joined: only what all of them enter is counted.
        self._key = f"nemovl_peers_{next(_NUMBERS)}" if self._store is not None else ""
        self._token = b""
        self._selector = selectors.DefaultSelector()
        self._connections: set[socket.socket] = set()
        self._closing = threading.Event()
        self._full: socket.socket | None = None

    def __enter__(self) -> PeerWatch:
        if self._store is None:
            return self
        try:
            self._listen(self._store) if self.rank == 0 else self._connect(self._store)
        except OSError as error:
            log.warning("rank %d does not hear of the end of other processes: %s", self.rank, error)
            return self
        threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take leave; a process that fails is one that the others lose."""
        self._closing.set()
        self._tell(_BYE if error is None else _FAILED)

    def _listen(self, store: dist.Store) -> None:
        try:
            listener = socket.create_server(("", 0), backlog=128)
        except OSError:
            store.set(self._key, "")  # nobody waits for what does not come
            raise
        self._selector.register(listener, selectors.EVENT_READ)
        # MASTER_ADDR is where rank 0 runs: the others have reached it there before.
        host, port = os.environ.get("MASTER_ADDR", "localhost"), listener.getsockname()[1]
        # A word that only users of the store can know: anybody may connect.
        self._token = secrets.token_hex(16).encode()
        store.set(self._key, f"{host} {port} {self._token.decode()}")

    def _connect(self, store: dist.Store) -> None:
        found = store.get(self._key).decode().split()
        if not found:
            raise OSError("the first process cannot listen")
        host, port, token = found
        connection = socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS)
        connection.sendall(token.encode())
        self._add(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                # Who knocks stays at the door, and would be reported again at once, forever. The listener is kept open:
                # closing it would tell those who wait that this process has ended.
                log.warning("rank %d does not hear of the end of all other processes: %s", self.rank, error)
                self._selector.unregister(listener)
                self._full = listener
            return
        with suppress(OSError):
            connection.settimeout(_WORD_SECONDS)
            try:
                word = connection.recv(len(self._token), socket.MSG_WAITALL)
            except OSError:
                word = b""
            if secrets.compare_digest(word, self._token):
                self._add(connection)
            else:
                connection.close()

    def _add(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connections.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _watch(self) -> None:
        last = None
        while last is None or (self._connections and time.monotonic() < last):
            for key, _ in self._selector.select(timeout=1.0):
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source in self._connections:
                    self._hear(source)
                else:
                    self._accept(source)
            if last is None and self._closing.is_set():
                last = time.monotonic() + _LINGER_SECONDS
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _hear(self, connection: socket.socket) -> None:
        try:
            word = connection.recv(1)
        except OSError:
            word = _LOST
        if word != _BYE and not self._closing.wait(FAIL_SECONDS if word == _FAILED else LEAVE_SECONDS):
            self._end()
        self._selector.unregister(connection)
        self._connections.discard(connection)
        connection.close()

    def _end(self) -> None:
        # The others hear of it from the first process, which alone is connected to all of them.
        self._tell(_LOST)
        log.error(
            "rank %d ended because another process did, while it waited for that process on its device; the other's "
            "own output, or the scheduler's, may say more. Run the same command again: it continues from the last "
            "checkpoint",
            self.rank,
        )
        logging.shutdown()
        os._exit(ExitCode.FAILED)

    def _tell(self, word: bytes) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.sendall(word)
