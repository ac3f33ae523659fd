"""A schedule on paper: everything adds up whatever fails, and it is noticed when something does not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nemovl_train import cli
from nemovl_train.config.compose import compose_run
from nemovl_train.schedule import simulate as module
from nemovl_train.schedule.simulate import Clock, Weather, made_plan, simulate
from nemovl_train.schedule.simulate_cli import as_text

STORM = Weather(node_mtbf_hours=8, time_limit_hours=0.15, lead_seconds=200, queue_hours=0.01, start_minutes=1, seed=5)
CALM = Weather(node_mtbf_hours=0, time_limit_hours=0)


@pytest.fixture(scope="module")
def stage():
    """Stage 1 on 512 ranks: one step in 400, in windows that are small enough for there to be several."""
    config = compose_run("nano_12b_v2_vl/stage1_sft_16k")
    return replace(
        config,
        trainer=replace(config.trainer, steps=134),
        checkpoint=replace(config.checkpoint, every_steps=10),
        workload=replace(config.workload, samples=81250),
        data=replace(config.data, window_samples=4096),
    )


def test_nothing_is_lost_or_repeated_in_a_storm(stage):
    (calm,) = simulate([stage], CALM)
    (storm,) = simulate([stage], STORM)
    assert (calm.failures, calm.limits, calm.repeated_steps) == (0, 0, 0)
    assert min(storm.failures, storm.limits, storm.repeated_steps) > 1
    assert storm.problems == calm.problems == []
    for key in ("steps", "packs", "samples", "tokens", "fill", "no_room", "ideal_hours"):
        assert getattr(storm, key) == getattr(calm, key), key
    assert calm.ranks == 512
    assert calm.tokens == pytest.approx(calm.planned_tokens, rel=0.02)
    assert calm.tokens == pytest.approx(134 * 128 * 16384, rel=0.02)
    assert storm.hours > 1.5 * calm.hours
    saves = 14
    seconds = calm.ideal_hours * 3600 + saves * module.make_plan(stage).checkpoint_seconds
    assert calm.hours * 3600 == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"packs_consumed": 128}, "packs were not taken exactly once"),
        ({"step": 1}, "packs were not taken exactly once"),
        ({"tokens_seen": 7}, "tokens, the packs hold"),
    ],
)
def test_a_restart_that_knows_the_wrong_thing_is_noticed(stage, monkeypatch, change, part):
    """The control: a state that comes back a little wrong."""
    right = module.restore

    def wrong(saved):
        state = right(saved)
        return replace(state, **{key: getattr(state, key) + value for key, value in change.items()})

    monkeypatch.setattr(module, "restore", wrong)
    (record,) = simulate([stage], STORM)
    assert any(part in problem for problem in record.problems), record.problems


def test_another_plan_after_a_restart_is_noticed(stage, monkeypatch):
    calls = []

    def other(config):
        calls.append(config)
        seed = config.trainer.seed + (len(calls) > 1)
        return made_plan(replace(config, trainer=replace(config.trainer, seed=seed)))

    monkeypatch.setattr(module, "made_plan", other)
    (record,) = simulate([stage], STORM)
    assert "a restart has another plan" in record.problems


def test_packs_dealt_twice_are_noticed(stage, monkeypatch):
    monkeypatch.setattr(module, "rank_places", lambda batch, rank, size: [rank // 2])
    (record,) = simulate([stage], CALM)
    assert any("not taken exactly once" in problem for problem in record.problems)


def test_failures_come_at_the_rate_asked_for():
    clock = Clock(Weather(node_mtbf_hours=640, time_limit_hours=0, start_minutes=0, queue_hours=0), nodes=64)
    failed = sum(not clock.passes(60.0) for _ in range(200_000))
    hours = clock.now / 3600
    assert failed == pytest.approx(hours / 10, rel=4 / np.sqrt(hours / 10))


def test_one_sample_a_pack_and_long_packs(stage):
    stage0 = compose_run("nano_12b_v2_vl/stage0_projector_warmup")
    stage4 = compose_run("nano_12b_v2_vl/stage4_long_context_300k")
    small = [
        replace(
            config,
            trainer=replace(config.trainer, steps=steps),
            workload=replace(config.workload, samples=samples),
        )
        for config, steps, samples in ((stage0, 8, 8192), (stage4, 20, 4900))
    ]
    records = simulate(small, STORM)
    assert [record.problems for record in records] == [[], []]
    assert records[0].samples == 8 * 1024
    assert records[1].fill > 0.95
    assert "no sample before its turn" in as_text(records)


def test_the_verb(capsys):
    words = ["simulate", "recipe=nano_12b_v2_vl/stage4_long_context_300k", "--scale", "20", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["stages"][0]["steps"] == 15
    assert cli.main([*words, "--node-mtbf-hours", "-1"]) == 2
    assert cli.main([*words, "--time-limit-hours", "0.1"]) == 2
    assert "leave no time for a step" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_schedule_at_a_hundredth(capsys):
    """Every stage on 512 ranks, with the failures of a large cluster. `--scale 1` takes minutes more."""
    assert cli.main(["simulate", "recipe=nano_12b_v2_vl/schedule", "--scale", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["problems"] for stage in found["stages"]] == [[]] * 5
    assert all(stage["ranks"] == 512 for stage in found["stages"])
