"""Two processes without a launcher that would end them: errors of one reach the other, and nothing hangs."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import running
import tiny_runs

from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.exit_codes import ExitCode
from nemovl_train.training.folder import StageFolder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
DRIVER = """
import os, sys
from pathlib import Path
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exit_codes import guarded
from nemovl_train.training import trainer
exec(sys.argv[2])
sys.exit(guarded(lambda: trainer.run(load_yaml(RunConfig, Path(sys.argv[1])))))
"""
FULL_DISK_ON_RANK_ZERO = """
from nemovl_train.checkpoint import sealed
def full(*args):
    raise OSError(28, "No space left on device")
sealed.write_hashed = full
"""
BAD_WEIGHT_ON_RANK_ONE = """
from dataclasses import replace
take = trainer.Trainer._next_packs
def poison(self):
    packs, seconds = take(self)
    if self.layout.rank == 1 and self.state.step == 1:
        packs = [replace(pack, loss_weight=pack.loss_weight * float("nan")) for pack in packs]
    return packs, seconds
trainer.Trainer._next_packs = poison
"""
STOP_AFTER_TWO = """
import signal
account = trainer.Trainer._account
def accounted(self, *args):
    account(self, *args)
    if self.state.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
trainer.Trainer._account = accounted
"""


def start(config, tmp_path, patch=""):
    """Exit codes and standard error of both processes."""
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base = {**os.environ, **address, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml"), patch]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**base, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=TIMEOUT_S)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], texts


@pytest.fixture
def config(data, tmp_path):
    return tiny_runs.run_config(data, tmp_path / "runs", steps=3)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(cp=2),
        ParallelConfig(cp=2, mamba_context="head_exchange"),
        ParallelConfig(tp=2, sequence_parallel=True),
    ],
    ids=["cp2", "cp2 heads", "tp2 sp"],
)
def test_a_whole_run_with_evaluation_is_that_of_one_process(data, tmp_path, parallel):
    alone, shared = (
        tiny_runs.with_evaluation(tiny_runs.run_config(data, tmp_path / name, steps=3), data)
        for name in ("alone", "shared")
    )
    while_training = replace(alone.evaluation, every_steps=1, keep_best=True)
    alone, shared = (replace(config, evaluation=while_training) for config in (alone, shared))
    running.run(alone)
    shared = replace(shared, parallel=parallel)
    codes, texts = start(shared, tmp_path)
    assert codes == [0, 0], texts
    for mine, theirs in zip(running.rows(shared), running.rows(alone), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float | dict) else value
            assert mine[key] == expected, (key, theirs["step"])
    folders = [StageFolder.of(config).path for config in (shared, alone)]
    scores = [json.loads((folder / "evaluation.json").read_text())["sources"]["pictures"] for folder in folders]
    assert scores[0] == {**scores[1], "loss": pytest.approx(scores[1]["loss"], rel=1e-4)}
    assert len({(folder / "predictions.json").read_text() for folder in folders}) == 1
    measured = [
        [json.loads(line)["loss"] for line in (folder / "validation.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    best = [{path.name for path in (folder / "best").iterdir()} for folder in folders]
    assert best[0] == best[1] == {f"step_{1 + measured[1].index(min(measured[1])):08d}"}


def test_a_run_goes_on_in_another_layout(data, tmp_path):
    """Two of four steps on two context parallel processes, the rest in one: losses of a run that never moved."""
    alone = tiny_runs.run_config(data, tmp_path / "alone", steps=4)
    running.run(alone)
    moving = tiny_runs.run_config(data, tmp_path / "moving", steps=4)
    # Weights that the next forward pass would collect have to be in the checkpoint.
    overlap = replace(moving.optim, overlap_grad_reduce=True, overlap_param_gather=True)
    first = replace(moving, parallel=ParallelConfig(cp=2), optim=overlap)
    codes, texts = start(first, tmp_path, STOP_AFTER_TWO)
    assert codes == [ExitCode.REQUEUE, ExitCode.REQUEUE], texts
    assert running.run(moving).code == ExitCode.OK
    losses = [[row["loss"] for row in running.rows(config)] for config in (moving, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_both_learn_that_the_folder_holds_another_run(config, tmp_path):
    running.run(config)
    other = replace(config, optim=replace(config.optim, lr=0.5))
    codes, texts = start(other, tmp_path)
    assert codes == [ExitCode.USAGE, ExitCode.USAGE]
    assert "optim.lr: 0.003 -> 0.5" in texts[0]


def test_a_full_disk_of_one_ends_both(config, tmp_path):
    codes, texts = start(config, tmp_path, FULL_DISK_ON_RANK_ZERO)
    assert codes[0] == ExitCode.USAGE
    assert codes[1] != 0
    assert "no space left" in texts[0]
    assert list(StageFolder.of(config).checkpoints.iterdir()) == []


def test_a_bad_step_of_one_is_a_bad_step_of_all_and_its_samples_are_named(config, tmp_path):
    codes, texts = start(config, tmp_path, BAD_WEIGHT_ON_RANK_ONE)
    assert codes == [0, 0], texts
    assert [row["applied"] for row in running.rows(config)] == [True, False, True]
    (event,) = running.events(config, "skipped_step")
    assert len(event["samples"]) == running.rows(config)[1]["samples"]
    assert "changed nothing" in texts[1]
