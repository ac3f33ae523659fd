"""The benchmarks' small forms run on CPU ranks and judge themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, out: Path, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), "--processes", "2", "--small", "--out", str(out), *options]
    subprocess.run(command, check=True, timeout=300)
    return json.loads(out.read_text())


def test_a_long_block_equals_its_reference(tmp_path):
    assert run("long_block.py", tmp_path / "out.json")["worst_relative_error"] <= 1e-5


def test_layouts_agree(tmp_path):
    rows = run("layouts.py", tmp_path / "out.json", "--steps", "3")["layouts"]
    assert set(rows) == {"dp", "tp2", "tp2sp", "cp2", "cp2heads"}
    for name, row in rows.items():
        assert row["loss_difference"] <= 5e-6, name
        assert row["grad_norm_difference"] <= 1e-5, name
