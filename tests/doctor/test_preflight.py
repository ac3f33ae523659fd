"""The preflight of two nodes under real torchrun, with a good node, one of other versions, and one that hangs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.site import read_excluded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DRIVER = """
import os, sys, time
sys.path.insert(0, os.environ["ROOT"])
from dataclasses import replace
from nemovl_train.doctor import preflight
from nemovl_train.exit_codes import guarded
look = preflight.collect_facts
def bad(folder):
    if os.environ["TROUBLE"] == "hang":
        time.sleep(3600)
    return replace(look(folder), clock_offset=0.0, open_files=8)
if os.environ["SLURMD_NODENAME"] == "second" and os.environ["TROUBLE"]:
    preflight.collect_facts = bad
sys.exit(guarded(lambda: preflight.main()))
"""


def start(tmp_path, trouble, *extra):
    (tmp_path / "driver.py").write_text(DRIVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "launch.node", "--nproc", "1", "--nnodes", "2", "--rendezvous", f"127.0.0.1:{port}"]
    line += ["--", str(tmp_path / "driver.py"), "--folder", str(tmp_path / "run"), *extra]
    line += ["--exclude-file", str(tmp_path / "bad.txt")]
    base = {**os.environ, "PYTHONPATH": str(ROOT), "ROOT": str(ROOT), "TROUBLE": trouble, "OMP_NUM_THREADS": "1"}
    names = ("first", "second")
    nodes = [subprocess.Popen(line, cwd=ROOT, env={**base, "SLURMD_NODENAME": name}) for name in names]
    try:
        # One that hangs is left to its scheduler.
        return [node.wait(timeout=240) for node in nodes[: 1 if trouble == "hang" else 2]]
    finally:
        for node in nodes:
            if node.poll() is None:
                for child in psutil.Process(node.pid).children(recursive=True):
                    child.kill()
                node.kill()


def test_good_nodes_pass_with_their_rates(tmp_path):
    assert start(tmp_path, "") == [0, 0]
    found = json.loads((tmp_path / "run/preflight.json").read_text())
    assert found["ok"]
    assert {node["node"] for node in found["nodes"]} == {"first", "second"}
    assert all(node["pair_rate"] > 0 and node["write_rate"] > 0 for node in found["nodes"])
    assert max(abs(node["clock_offset"]) for node in found["nodes"]) < 1
    assert read_excluded(tmp_path / "bad.txt") == []


def test_a_bad_node_is_refused_by_name(tmp_path):
    assert all(code != 0 for code in start(tmp_path, "limits"))
    assert read_excluded(tmp_path / "bad.txt") == ["second"]
    assert "8 open files at most" in (tmp_path / "run/preflight.json").read_text()


def test_a_silent_node_is_named_and_takes_nobody_with_it(tmp_path):
    (code,) = start(tmp_path, "hang", "--answer-seconds", "40")
    assert code != 0
    assert read_excluded(tmp_path / "bad.txt") == ["second"]
    assert "did not answer in time" in (tmp_path / "run/preflight.json").read_text()
