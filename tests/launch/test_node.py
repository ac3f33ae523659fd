"""One node's launcher: torchrun's exit codes and signals put right, on small programs of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.node import NodeJob, _cache_variables, run_node, stagger_seconds, true_exit_code
from nemovl_train.exit_codes import EXIT_FILE, ExitCode, guarded, read_exit_file

ROOT = Path(__file__).parents[2]
STOPS = """
import os, signal, sys, time
from nemovl_train.exit_codes import guarded
def run():
    asked = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    print("ready", flush=True)
    while not asked:
        time.sleep(0.02)
    time.sleep(float(os.environ["SAVE_SECONDS"]))
    return 75
sys.exit(guarded(run))
"""


@pytest.mark.parametrize(
    ("launcher", "reported", "asked", "expected"),
    [
        (0, 0, False, 0),
        (0, 75, True, 75),
        (1, 2, False, 2),
        (1, 0, False, 1),  # rank 0 was done, another failed
        (1, 75, True, 1),
        (1, None, True, 75),  # killed before there was anything to save
        (1, None, False, 1),
        (0, None, False, 0),
    ],
)
def test_the_true_exit_code(launcher, reported, asked, expected):
    assert true_exit_code(launcher, reported, asked_to_stop=asked) == expected


def test_a_process_that_saved_ends_with_0_under_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    assert guarded(lambda: ExitCode.REQUEUE) == 0
    assert (tmp_path / "code").read_text() == "75 0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert guarded(lambda: ExitCode.USAGE) == ExitCode.USAGE
    assert (tmp_path / "code").read_text() == "75 0"
    monkeypatch.delenv(EXIT_FILE)
    assert guarded(lambda: ExitCode.REQUEUE) == ExitCode.REQUEUE


def test_a_process_that_was_started_again_leaves_no_code_of_the_one_before(tmp_path, monkeypatch):
    """The second round is killed: what stands in the file afterwards must not be the first round's crash."""
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    assert guarded(lambda: ExitCode.FAILED) == ExitCode.FAILED
    assert read_exit_file(tmp_path / "code") == (1, 0)
    seen = []

    def again() -> int:
        seen.append(read_exit_file(tmp_path / "code"))
        return ExitCode.OK

    monkeypatch.setenv("LOCAL_RANK", "1")
    guarded(again)
    monkeypatch.setenv("LOCAL_RANK", "0")
    guarded(again)
    assert seen == [(1, 0), None]  # only the process that writes the file clears it


def test_a_signal_while_a_node_waits_for_its_turn_is_a_stop(tmp_path):
    """Node 100 of a run would start after 50 s. The time limit comes first: no crash, no torchrun, a requeue."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch import node; print('here', flush=True)"
    line = [sys.executable, "-c", f"{code}; sys.exit(node.main())", "--nproc", "1", "--stagger", "0.5"]
    line += ["--report", str(tmp_path / "report"), "--", str(tmp_path / "never.py")]
    environment = {**os.environ, "SLURM_PROCID": "100"}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=10) == 0
    assert (tmp_path / "report").read_text() == "75\n"


def test_caches_lie_where_the_node_says_unless_the_user_did(tmp_path):
    found = _cache_variables(tmp_path / "c", {"CUDA_CACHE_PATH": "/mine"})
    assert set(found) == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert all(Path(path).is_dir() and Path(path).is_relative_to(tmp_path) for path in found.values())
    assert _cache_variables(None, {}) == {}
    assert [stagger_seconds(node, 0.5) for node in (0, 3, 1000)] == [0, 1.5, 60]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_save_may_take_longer_than_torchruns_patience(tmp_path, number):
    """torchrun kills its processes 30 s after a signal that it handles; with SIGUSR1 this one saves for 33 s."""
    (tmp_path / "stops.py").write_text(STOPS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch.node import main; sys.exit(main())"
    line = [sys.executable, "-c", code, "--nproc", "1", "--", str(tmp_path / "stops.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SAVE_SECONDS": "33" if number == signal.SIGUSR1 else "0.1"}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=60) == ExitCode.REQUEUE


@pytest.mark.slow
def test_a_crash_is_a_failure_and_bad_usage_stays_bad_usage(tmp_path):
    program = tmp_path / "ends.py"
    program.write_text("import os\nos.kill(os.getpid(), 9)\n")
    assert run_node(NodeJob(nproc=1), [str(program)]) == ExitCode.FAILED
    program.write_text("import sys\nfrom nemovl_train.exit_codes import guarded\nsys.exit(guarded(lambda: 2))\n")
    report = tmp_path / "report"
    assert run_node(NodeJob(nproc=1), [str(program)], report=report) == ExitCode.USAGE
    assert report.read_text() == "2\n"
