"""Ranks that die, hang or go wrong: the others stop soon, say why in one sentence, and the run continues."""

import json
import time
from dataclasses import replace

import pytest
import running
import tiny_runs
from ends import final, last_good_step
from injector import Fault

from nemovl_train.exit_codes import ExitCode
from nemovl_train.training.folder import StageFolder

KILLED = -9


def config_of(data, root, *, every=2, **trainer):
    config = tiny_runs.run_config(data, root, **trainer)
    return replace(config, checkpoint=replace(config.checkpoint, every_steps=every))


def test_a_killed_rank_stops_the_others_within_seconds_and_they_say_so(data, tmp_path, run):
    config = config_of(data, tmp_path)
    began = time.monotonic()
    ended = run(config, ranks=2, fault=Fault("step", "kill", rank=1, step=3))
    assert ended.codes == [ExitCode.FAILED, KILLED]
    assert time.monotonic() - began < 20
    assert "ended because another process did, without a word: it was killed" in ended.texts[0]
    assert "Traceback" not in ended.texts[0]
    assert run(config, ranks=2).codes == [0, 0]


def test_the_cause_of_one_rank_is_told_by_all(data, tmp_path, run):
    config = config_of(data, tmp_path)
    ended = run(config, ranks=2, fault=Fault("step", "fail", rank=1, step=1))
    assert ended.codes == [ExitCode.FAILED, ExitCode.FAILED]
    assert "ended because another process did. rank 1: ValueError: injected" in ended.texts[0]
    assert "Traceback" not in ended.texts[0]
    assert "ValueError: injected" in ended.texts[1]


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_the_stacks_of_the_others(data, tmp_path, run):
    """The one that is frozen says nothing; the watchdog of the other says which collective it waits in."""
    config = config_of(data, tmp_path, stall_timeout_s=3.0)
    config = replace(config, parallel=replace(config.parallel, collective_timeout_s=600.0))
    ended = run(config, ranks=2, fault=Fault("step", "freeze", rank=1, step=2), timeout_s=20)
    assert ended.codes == [ExitCode.FAILED, KILLED]
    stacks = (StageFolder.of(config).path / "stacks" / "rank_00000.txt").read_text()
    assert "stuck in all_reduce, called from step.py" in stacks
    assert "Current thread" in stacks or "Thread 0x" in stacks
    assert "no progress for" in ended.texts[0]


@pytest.mark.slow
def test_data_that_do_not_come_end_the_run_with_stacks_of_every_rank(data, tmp_path, run):
    config = config_of(data, tmp_path, stall_timeout_s=3.0)
    config = replace(config, parallel=replace(config.parallel, collective_timeout_s=600.0))
    ended = run(config, ranks=2, fault=Fault("data", "hang", rank=1, step=2), timeout_s=30)
    assert ended.codes == [ExitCode.FAILED, ExitCode.FAILED]
    stacks = [path.read_text() for path in sorted((StageFolder.of(config).path / "stacks").iterdir())]
    assert len(stacks) == 2
    assert "_next_packs" in stacks[1] or "wrapped" in stacks[1]


@pytest.mark.slow
def test_a_collective_that_takes_too_long_speaks_before_the_watchdog(data, tmp_path, run):
    config = config_of(data, tmp_path, stall_timeout_s=60.0)
    config = replace(config, parallel=replace(config.parallel, collective_timeout_s=3.0))
    ended = run(config, ranks=2, fault=Fault("data", "freeze", rank=1, step=2), timeout_s=90)
    assert ended.codes == [ExitCode.FAILED, KILLED]
    assert "Timed out" in ended.texts[0] or "timed out" in ended.texts[0]
    assert not (StageFolder.of(config).path / "stacks").exists()


def test_a_flipped_bit_of_one_rank_is_found_and_named(data, tmp_path, run):
    config = config_of(data, tmp_path, check_replicas_every=1)
    ended = run(config, ranks=2, fault=Fault("step", "flip", rank=1, step=2))
    assert ended.codes == [ExitCode.FAILED, ExitCode.FAILED]
    assert "weights that must be equal differ: " in ended.texts[0]
    assert "on ranks [0, 1] (no majority)" in ended.texts[0]
    assert last_good_step(config) in (None, 2)  # the one begun before the flip, if it was on the disk in time


@pytest.mark.slow
def test_with_three_replicas_the_broken_rank_is_named(data, tmp_path, run):
    config = config_of(data, tmp_path, check_replicas_every=1, global_batch=3)
    ended = run(config, ranks=3, fault=Fault("step", "flip", rank=2, step=1))
    assert set(ended.codes) == {ExitCode.FAILED}
    assert "on rank 2" in ended.texts[0]


def test_a_spike_changes_nothing_and_is_counted_across_a_restart(data, tmp_path, run):
    """66 quiet steps fill the window; then one loss is a hundred times as large."""
    config = config_of(data, tmp_path, every=67, steps=70, spike_sigma=6.0)
    config = replace(config, optim=replace(config.optim, lr=1e-6))
    assert run(config, fault=Fault("accounted", "spike", step=66)).codes == [0]
    applied = [row["applied"] for row in running.rows(config)]
    assert applied == [True] * 66 + [False] + [True] * 3
    (event,) = running.events(config, "skipped_step")
    assert event["step"] == 67
    assert event["samples"]
    folder = StageFolder.of(config).checkpoints
    states = [json.loads((folder / name / "state.json").read_text()) for name in ("step_00000067", "step_00000070")]
    assert [state["bad_steps"] for state in states] == [1, 1]
    assert len(states[0]["recent_losses"]) == 66
    # Without the rule the same step is taken: the limit is what kept it out.
    other = replace(config, run=replace(config.run, stage="other"), trainer=replace(config.trainer, spike_sigma=0.0))
    assert run(other, fault=Fault("accounted", "spike", step=66)).codes == [0]
    assert all(row["applied"] for row in running.rows(other))


@pytest.mark.parametrize(
    "point", ["write", *(pytest.param(name, marks=pytest.mark.slow) for name in ("step", "publish", "purge"))]
)
def test_killed_anywhere_and_started_again(data, tmp_path, run, point):
    whole = config_of(data, tmp_path / "whole", every=1)
    assert run(whole).codes == [0]
    config = config_of(data, tmp_path / "killed", every=1)
    assert run(config, fault=Fault(point, "kill", step=4)).codes == [KILLED]
    # What is begun at a step is published at one of the next: two saves back at most.
    assert last_good_step(config) in (2, 3, 4)
    assert run(config).codes == [0]
    assert final(config) == final(whole)


@pytest.mark.slow
def test_killed_at_every_change_that_a_save_makes_on_the_disk(data, tmp_path, run):
    """From the folder to the deletion of the checkpoint before: each write, flush, rename and removal in turn."""

    def config(name):
        found = config_of(data, tmp_path / name)
        return replace(found, checkpoint=replace(found.checkpoint, keep_last=1))

    whole = config("whole")
    assert run(whole).codes == [0]
    expected, ends, goods = final(whole), [], set()
    while not ends or ends[-1] == KILLED:
        killed = config(f"killed{len(ends)}")
        # A checkpoint of step 2 is there; the save that dies is the first of the second start.
        assert run(killed, fault=Fault("accounted", "term", step=2)).codes == [ExitCode.REQUEUE]
        ends += run(killed, fault=Fault("change", "kill", step=len(ends))).codes
        goods.add(last_good_step(killed))
        assert goods <= {2, 4, 6}
        assert run(killed).codes == [0]
        assert final(killed) == expected, len(ends)
    assert ends[-1] == 0
    assert len(ends) > 20
    assert goods >= {2, 4}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "point"), [(1, "step"), (1, "micro_batch"), (2, "step")])
def test_killed_at_every_step_of_twelve(data, tmp_path, run, ranks, point):
    whole = config_of(data, tmp_path / "whole", steps=12)
    assert run(whole, ranks=ranks).codes == [0] * ranks
    for step in range(12):
        config = config_of(data, tmp_path / f"killed{step}", steps=12)
        assert KILLED in run(config, ranks=ranks, fault=Fault(point, "kill", rank=ranks - 1, step=step)).codes
        assert run(config, ranks=ranks).codes == [0] * ranks
        assert final(config) == final(whole), step
