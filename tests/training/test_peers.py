"""The end of one process ends those that wait for it where no error reaches them."""

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from nemovl_train.training.peers import PeerWatch

ROOT = Path(__file__).parents[2]
RANKS = 3
SCRIPT = """
import os, signal, sys, time
import torch.distributed as dist
from nemovl_train.training import peers

peers.LEAVE_SECONDS = 0.3
peers.FAIL_SECONDS = 5.0 if sys.argv[1] == "all failed" else 0.3
how, file = sys.argv[1:]
rank = 0
for number in (1, 2):
    if os.fork() == 0:
        rank = number
        break
code = 0
if how == "deaf":
    peers.socket.create_server = lambda *args, **options: os.open("/nowhere", 0)
if rank == 0:
    with peers.PeerWatch(0, 1, None):
        pass  # what it does alone before the others join
try:
    with peers.PeerWatch(rank, 3, dist.FileStore(file, 3)):
        time.sleep(0.5 + 0.2 * rank)
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and how in ("failed", "all failed"):
            raise ValueError
        if how == "all failed":
            time.sleep(1.0)  # a tracker that takes its time to close
            raise ValueError
        if how not in ("well", "deaf"):
            time.sleep(60)  # where a process waits for its device
        if how == "well" and rank == 2:
            time.sleep(1.0)  # the others have long left
except ValueError:
    code = 3
if rank:
    os._exit(code)
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)), flush=True)
os._exit(code)
"""


@pytest.mark.parametrize(
    ("how", "first"),
    [
        ("killed", 1),
        ("all failed", 3),
        pytest.param("failed", 1, marks=pytest.mark.slow),
        *(pytest.param(name, 0, marks=pytest.mark.slow) for name in ("well", "deaf")),
    ],
)
def test_the_others_end(tmp_path, how, first):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, how, str(tmp_path / "store")]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == first, done.stderr
    assert time.monotonic() - began < 30
    assert done.stderr.count("does not hear of the end") == (RANKS if how == "deaf" else 0)
    if first != 1:
        assert done.stdout == f"[{first}, {first}]\n"
        assert "ended" not in done.stderr
    else:
        assert done.stderr.count("ended because another process did") == RANKS - 1


@pytest.fixture
def pair(monkeypatch):
    """Two watches that share a key, as those of two processes would."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    store = dist.HashStore()
    first, second = PeerWatch(0, 2, store), PeerWatch(1, 2, store)
    second._key = first._key
    first._listen(store)
    yield first, second, store
    for watch in (first, second):
        for key in list(watch._selector.get_map().values()):
            key.fileobj.close()
        watch._selector.close()


def test_a_host_that_vanished_is_asked_for(pair):
    """Without questions of the kernel's own, nothing tells a silent connection from a dead one."""
    first, second, store = pair
    (listener,) = (key.fileobj for key in first._selector.get_map().values())
    knock = threading.Thread(target=second._connect, args=(store,))
    knock.start()
    first._accept(listener)
    knock.join()
    for watch in (first, second):
        (connection,) = watch._connections
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [60, 15, 4]


def test_a_process_out_of_files_says_so_and_does_not_spin(pair, caplog):
    first, second, store = pair
    second._connect(store)
    (listener,) = (key.fileobj for key in first._selector.get_map().values())
    assert first._selector.select(timeout=5)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))  # no number is left for another file
    try:
        first._accept(listener)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "does not hear of the end of all other processes: [Errno 24]" in caplog.text
    assert first._selector.select(timeout=0) == [], "the loop would be woken again and again"
    (connection,) = second._connections
    connection.settimeout(0.2)
    with pytest.raises(TimeoutError):  # and not that the first process is gone
        connection.recv(1)
    listener.close()
