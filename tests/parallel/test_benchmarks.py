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


def test_training_cases_run_small(tmp_path):
    """Every case's options, on as many CPU ranks as the case has GPUs at most two."""
    sys.path.insert(0, str(BENCHMARKS))
    from train_cases import FOLDER

    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    single = [name for name in names if "gpus:" not in (FOLDER / f"{name}.yaml").read_text()]
    page = tmp_path / "page.txt"
    for processes, chosen in ((1, single), (4, [name for name in names if name not in single])):
        out = tmp_path / f"{processes}.json"
        own = [sys.executable, str(BENCHMARKS / "train.py"), *chosen, "--small", "--out", str(out)]
        subprocess.run([*own, "--profile", str(page)], check=True, timeout=900)
        rows = json.loads(out.read_text())["rows"]
        assert [row["case"] for row in rows] == chosen
        for row in rows:
            assert "failed" not in row, row
            if row["case"] == "B9":
                assert row["weight_gradient_error"] < 1e-5
                assert row["hidden_gradient_error"] < 1e-5
            else:
                assert row["tokens_per_second_per_gpu"] > 0
                assert row["loss_last"] < row["loss_first"]
    assert page.read_text().count("## ") == len(names) - 1
