"""Killed at random moments, again and again, until the run is done: a good checkpoint is never lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from ends import final, last_good_step

from nemovl_train.config.dump import dump_yaml

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TRIALS = int(os.environ.get("KILL_TRIALS", "5"))
"""`KILL_TRIALS=50` for a release."""


@pytest.mark.parametrize("trial", range(TRIALS))
def test_random_moments(data, tmp_path, run, trial):
    whole = tiny_runs.run_config(data, tmp_path / "whole", steps=40)
    assert run(whole).codes == [0]
    config = tiny_runs.run_config(data, tmp_path / "killed", steps=40)
    moments, seen, starts = random.Random(trial), 0, 0
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    code = -signal.SIGKILL
    while code == -signal.SIGKILL and starts < 4:
        process = start(path)
        try:
            # From the first step on; the start before it takes seconds in which nothing is written.
            wait_for_rows(tmp_path / "killed" / "mini" / "train" / "metrics.jsonl", process, moments.randrange(1, 12))
            time.sleep(moments.random() * 0.1)
        finally:
            process.kill()
        code, starts = process.wait(), starts + 1
        good = last_good_step(config)
        assert good is None or good >= seen
        seen = good or seen
    assert code in (0, -signal.SIGKILL)
    assert run(config).codes == [0]
    assert final(config) == final(whole)


def start(config: Path) -> subprocess.Popen:
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, str(HERE / "torchrun_driver.py"), str(config)], env=environment)


def wait_for_rows(metrics: Path, process: subprocess.Popen, more: int) -> None:
    """Until the file has this many rows more than when the process began, or the process ends."""
    before = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    while process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= min(before + more, 40):
            return
        time.sleep(0.002)
