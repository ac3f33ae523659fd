"""The benchmarks' small forms run on CPU ranks and judge themselves."""

import importlib.util
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


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="the extra `deepspeed` is not installed: pip install -e '.[deepspeed]'",
)
def test_the_deepspeed_benchmark_measures_every_rank(tmp_path):
    found = run("deepspeed_13b.py", tmp_path / "out.json", "--steps", "3", "--packs", "4", "--offload-params")
    assert [row["rank"] for row in found["ranks"]] == [0, 1]
    for row in found["ranks"]:
        assert row["trained"] == row["parameters"] > 0
        assert row["tokens_per_second"] > 0
        assert row["host"]["resident_gib"] > 0
