"""A stage's folder belongs to one run at a time, on one machine and on several."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemovl_train.exceptions import CheckpointError
from nemovl_train.training import lock
from nemovl_train.training.lock import FolderLock

HOLDER = "import sys, time; from pathlib import Path; from nemovl_train.training.lock import FolderLock\n"
HOLDER += "held = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)


def beat(folder: Path, **changes) -> None:
    """A sign of life, as another machine leaves it."""
    holder = {"host": "elsewhere", "pid": 7, "job": "123", "time": time.time(), **changes}
    (folder / ".lock").write_text(json.dumps(holder).ljust(512))


def test_it_goes_from_one_to_the_next(tmp_path):
    for _ in range(2):
        held = FolderLock(tmp_path)
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        held.release()
        assert (tmp_path / ".lock").read_text() == ""


def test_a_run_of_another_machine_that_lives_keeps_its_folder(tmp_path):
    """Where `flock` is not passed on between machines, its signs of life tell."""
    over = threading.Event()

    def keep_beating():
        while not over.wait(0.02):
            beat(tmp_path)

    beat(tmp_path)
    thread = threading.Thread(target=keep_beating)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match=r"by another process \(job 123, process 7 on elsewhere\): wait"):
            FolderLock(tmp_path)
    finally:
        over.set()
        thread.join()


def test_a_run_of_another_machine_that_is_gone_is_followed(tmp_path, caplog):
    beat(tmp_path)
    FolderLock(tmp_path).release()
    assert "was in use by job 123, process 7 on elsewhere; waiting for its next sign of life" in caplog.text
    assert "taking the folder over" in caplog.text


def test_a_killed_run_of_this_machine_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 100.0)
    beat(tmp_path, host=socket.gethostname())
    FolderLock(tmp_path).release()


@pytest.mark.slow
def test_two_processes(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=rf"process {process.pid} on"):
        FolderLock(tmp_path)
    process.kill()
    process.wait()
    FolderLock(tmp_path).release()
