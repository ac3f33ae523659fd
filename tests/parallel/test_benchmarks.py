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


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_training_cases_run_small(gpus, tmp_path):
    """Every case's options, on as many CPU ranks as the case has GPUs; peers learn as ours does."""
    sys.path.insert(0, str(BENCHMARKS))
    from train_cases import FOLDER, load_cases

    every = {path.stem: load_cases(path.stem, []) for path in sorted(FOLDER.glob("*.yaml"))}
    chosen = [name for name, cases in every.items() if cases[0].gpus == gpus]
    runs = [case for name in chosen for case in every[name]]
    page, out = tmp_path / "page.txt", tmp_path / "out.json"
    own = [sys.executable, str(BENCHMARKS / "train.py"), *chosen, "--small", "--out", str(out)]
    subprocess.run([*own, "--profile", str(page)], check=True, timeout=900)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["engine"]) for row in rows] == [(case.case, case.engine) for case in runs]
    first = {}
    for row in rows:
        assert "failed" not in row, row
        if row["options"]["kind"] == "head":
            assert row["weight_gradient_error"] < 1e-5
            assert row["hidden_gradient_error"] < 1e-5
            continue
        assert row["tokens_per_second_per_gpu"] > 0
        assert row["loss_last"] < row["loss_first"]
        parallel = row["options"]["parallel"]
        # Runs of one case with equally many data parallel ranks see the same packs.
        own = first.setdefault((row["case"], parallel["tp"] * parallel["cp"]), row)
        for key in ("loss_first", "loss_last"):
            assert row[key] == pytest.approx(own[key], rel=1e-5), (row["case"], row["engine"], key)
    assert page.read_text().count("## ") == sum(case.kind == "train" for case in runs)
