"""Whole runs under SLURM's commands and real torchrun: time limits, a node that dies, a schedule that ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_slurm import FakeSlurm
from small_schedule import write_recipes

from nemovl_train import cli
from nemovl_train.exit_codes import ExitCode

pytestmark = pytest.mark.slow

STEPS = 40
SITE = ["slurm.nodes=2", "slurm.processes_per_node=1", "slurm.gpu_request=none", "slurm.stagger_seconds=0"]


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def resumed(folder: Path) -> list[int]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event["resumed_from_step"] for event in map(json.loads, lines) if event["event"] == "start"]


def test_a_schedule_goes_through_three_time_limits_to_its_end(data, parts, tmp_path, monkeypatch, capsys):
    """Two nodes, one process each; the job asks to be queued again until it is done, and takes no step twice."""
    monkeypatch.chdir(tmp_path)
    slurm = FakeSlurm(tmp_path / "slurm", nodes=2)
    monkeypatch.setenv("PATH", slurm.environment["PATH"])
    monkeypatch.setenv("FAKE_SLURM", str(slurm.spool))
    recipe = write_recipes(tmp_path, data, parts, steps=STEPS)
    assert cli.main(["launch", "slurm", f"recipe={recipe}", f"slurm.caches={tmp_path}/caches", *SITE, "--json"]) == 0
    script = Path(json.loads(capsys.readouterr().out)["script"])
    assert slurm.submitted() == [["--parsable", str(script)]]

    folders = [tmp_path / "runs/chain" / name for name in ("first", "second")]
    seen = 0
    limits = 0
    for restarts in range(6):
        taken = sum(len(rows(folder)) for folder in folders)
        assert taken >= seen
        seen = taken

        def limit(taken=taken, limits=limits):
            return limits < 3 and sum(len(rows(folder)) for folder in folders) >= taken + 10

        code, log = slurm.run(script, restarts, limit)
        if not slurm.requeued():
            break
        assert code == ExitCode.REQUEUE, log
        limits += 1
    assert (code, limits) == (0, 3), log
    assert not list((script.parent).glob("failures.*"))
    for folder in folders:
        assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
        assert (folder / "checkpoints" / f"step_{STEPS:08d}" / "COMPLETE").is_file()
    assert sum(start > 0 for folder in folders for start in resumed(folder)) >= 2
    assert (tmp_path / "caches" / "triton").is_dir()
    # The next start finds nothing to do and is not queued again.
    assert slurm.run(script, 9, lambda: False)[0] == 0
    assert not slurm.requeued()


def agent(tmp_path: Path, recipe: Path, port: int, log: str) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-m", "nemovl_train.cli", "launch", "torchrun", f"recipe={recipe}", "run.name=pair"]
    line += ["--nproc", "1", "--nnodes", "2", "--rendezvous", f"127.0.0.1:{port}", "--max-restarts", "3"]
    with (tmp_path / log).open("wb") as out:
        return subprocess.Popen(line, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def test_a_node_that_died_comes_back_and_the_run_ends(data, parts, tmp_path):
    """Two torchrun agents meet on the loopback; one is killed with all its processes, started again, and rejoins."""
    write_recipes(tmp_path, data, parts, steps=STEPS)
    recipe = tmp_path / "second.yaml"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "runs/pair/second"
    first = agent(tmp_path, recipe, port, "first.log")
    time.sleep(3)  # the first one started hosts the meeting; the other is the node that dies
    second = agent(tmp_path, recipe, port, "second.log")
    try:
        deadline = time.monotonic() + 300
        while len(rows(folder)) < 10:
            assert time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        for process in [*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)]:
            process.send_signal(signal.SIGKILL)
        second.wait()
        second = agent(tmp_path, recipe, port, "second.log")
        codes = first.wait(timeout=400), second.wait(timeout=60)
    finally:
        for process in (first, second):
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
    assert codes == (0, 0), (tmp_path / "first.log").read_text() + (tmp_path / "second.log").read_text()
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    starts = resumed(folder)
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1] < STEPS
    assert os.listdir(folder / "checkpoints")
