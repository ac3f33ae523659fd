"""Killed at random moments, again and again, until the run is done: a good checkpoint is never lost."""

import os
import random
import time

import pytest
import tiny_runs
from ends import final, last_good_step

pytestmark = pytest.mark.slow

TRIALS = int(os.environ.get("KILL_TRIALS", "5"))
"""Fifty of the schedule below are part of `make test-all`; these runs are shorter and of one or two ranks."""

MOST_KILLS = 6
STEPS = 40


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("trial", range(TRIALS))
def test_random_moments(data, tmp_path, run, trial, ranks):
    whole = tiny_runs.run_config(data, tmp_path / "whole", steps=STEPS)
    began = time.monotonic()
    assert run(whole, ranks=ranks).codes == [0] * ranks
    lasts = time.monotonic() - began
    config = tiny_runs.run_config(data, tmp_path / "killed", steps=STEPS)
    moments, seen = random.Random(trial), 0
    for _ in range(MOST_KILLS):
        codes = run(config, ranks=ranks, kill_after_s=moments.uniform(0.1, 1.0) * lasts).codes
        good = last_good_step(config) or 0
        assert good >= seen
        seen = good
        if codes == [0] * ranks:
            break
    assert seen > 0  # the kills did not all come before the first checkpoint
    assert run(config, ranks=ranks).codes == [0] * ranks
    assert final(config) == final(whole)
