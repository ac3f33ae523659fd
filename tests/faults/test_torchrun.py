"""Under torchrun, with the options that `nemovl launch torchrun` renders."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import running
import tiny_runs
from ends import final, last_good_step

from launch.node import NodeJob
from nemovl_train.config.dump import dump_yaml
from nemovl_train.training.folder import StageFolder

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TIMEOUT_S = 200


def start(config, tmp_path, *fault, restarts=0):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    job = NodeJob(nproc=2, nnodes=1, rendezvous="", run_id="faults", max_restarts=restarts)
    command = job.command([str(HERE / "torchrun_driver.py"), str(path), *map(str, fault)])
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def clean(data, tmp_path, run):
    config = tiny_runs.run_config(data, tmp_path / "clean")
    assert run(config, ranks=2).codes == [0, 0]
    return final(config)


def test_a_killed_rank_is_restarted_once_and_the_run_ends_as_if_nothing_had_been(data, tmp_path, clean):
    config = tiny_runs.run_config(data, tmp_path)
    process = start(config, tmp_path, "step", "kill", 1, 4, restarts=1)
    _, text = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, text
    starts = [event["resumed_from_step"] for event in running.events(config, "start")]
    assert starts in ([0, 2], [0, 4]), starts
    assert final(config) == clean


def test_usr1_reaches_every_rank_and_everything_is_saved(data, tmp_path, clean, run):
    config = tiny_runs.run_config(data, tmp_path)
    process = start(config, tmp_path, "step", "hang", 9, 9)  # a fault that never strikes
    metrics = StageFolder.of(config).path / "metrics.jsonl"
    end = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not metrics.is_file() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, text = process.communicate(timeout=TIMEOUT_S)
    saved = last_good_step(config)
    assert "run again to continue" in text or saved == 6, text
    assert not list(StageFolder.of(config).checkpoints.glob(".writing_*"))
    assert run(config, ranks=2).codes == [0, 0]
    assert final(config) == clean
