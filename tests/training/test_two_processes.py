"""Two processes without a launcher that would end them: errors of one reach the other, and nothing hangs."""

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
from megatron.core.dist_checkpointing import serialization
def full(*args):
    raise OSError(28, "No space left on device")
serialization.save_config = full
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
