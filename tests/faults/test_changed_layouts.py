"""A run goes on in another layout: the same packs, weights and moments, and the losses of a run that never moved."""

from dataclasses import replace

import pytest
import running
import tiny_runs
from ends import packs
from injector import Fault

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.exit_codes import ExitCode

pytestmark = pytest.mark.slow

BOUND = 5e-6
STEPS, MOVED_AT = 14, 4
START = ParallelConfig(tp=2)  # of four ranks: DP 2 x TP 2


def config_of(data, root, parallel):
    config = tiny_runs.run_config(data, root, steps=STEPS, global_batch=4)
    return replace(config, parallel=parallel)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, ParallelConfig()), (4, ParallelConfig()), (2, ParallelConfig(cp=2)), (4, START)],
    ids=["dp1", "dp4", "tp1 cp2", "unchanged"],
)
def test_ten_steps_after_the_move(data, tmp_path, run, ranks, parallel):
    stay = config_of(data, tmp_path / "stay", START)
    assert run(stay, ranks=4, timeout_s=200).codes == [0] * 4
    moving = config_of(data, tmp_path / "moving", START)
    stopped = run(moving, ranks=4, fault=Fault("accounted", "term", rank=3, step=MOVED_AT), timeout_s=200)
    assert stopped.codes == [ExitCode.REQUEUE] * 4, stopped.texts
    moved = run(replace(moving, parallel=parallel), ranks=ranks, timeout_s=200)
    assert moved.codes == [0] * ranks, moved.texts
    rows = [running.rows(config) for config in (moving, stay)]
    assert len(rows[0]) == STEPS
    assert packs(moving) == packs(stay)
    for mine, theirs in zip(*rows, strict=True):
        for key in ("packs_consumed", "tokens", "supervised_tokens", "visual_tokens", "samples", "tokens_seen"):
            assert mine[key] == theirs[key], (key, mine["step"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=BOUND), mine["step"]
