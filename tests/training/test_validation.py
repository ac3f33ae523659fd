"""Held-out loss while training: what it measures, that it changes nothing, what is kept, and when a run ends."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import running
import tiny_runs
import torch

from data_pipelines.loader import heldout_packs
from nemovl_train.checkpoint import sealed
from nemovl_train.evaluation import run as evaluation
from nemovl_train.evaluation.run import Score, evaluation_data
from nemovl_train.exceptions import CheckpointError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.model.batch import PackBatch
from nemovl_train.parallel.layout import Layout
from nemovl_train.training import trainer, validation
from nemovl_train.training.ending import ending_of
from nemovl_train.training.folder import StageFolder
from nemovl_train.training.state import TrainState, read_state

STEPS = 6
PACKS = 4  # of a measurement


def validated(data, root, **options):
    config = tiny_runs.with_evaluation(tiny_runs.run_config(data, root, steps=STEPS), data)
    sources = {**config.evaluation.sources, "text": str(data / "text")}
    return replace(config, evaluation=replace(config.evaluation, sources=sources, **options))


def rows(config) -> list[dict]:
    path = StageFolder.of(config).path / "validation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupt(*args, **options):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    config = validated(data, tmp_path_factory.mktemp("whole"), every_steps=1, keep_best=True)
    outcome = running.run(config)
    assert outcome.code == ExitCode.OK
    return config, outcome


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses as a test wants them, by step."""
    wanted: dict[int, float] = {}
    step = 0
    measure = validation.Validation.measure_if_due

    def spied(self, state):
        nonlocal step
        step = state.step
        measure(self, state)

    monkeypatch.setattr(validation.Validation, "measure_if_due", spied)
    monkeypatch.setattr(validation, "mean_loss", lambda scores: wanted[step])
    return wanted


def test_it_measures_the_heldout_loss_and_changes_nothing(data, whole, tmp_path):
    config, outcome = whole
    plain = validated(data, tmp_path)
    other = running.run(plain)
    assert all(torch.equal(outcome.tensors[name], tensor) for name, tensor in other.tensors.items())
    assert running.rows(config) == running.rows(plain)
    assert not (StageFolder.of(plain).path / "validation.jsonl").exists()
    found = rows(config)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert set(found[0]["sources"]) == {"pictures", "text"}
    assert found[-1]["loss"] == pytest.approx(sum(found[-1]["sources"].values()) / 2)
    # The last one is what the evaluation at the end measures.
    final = json.loads((StageFolder.of(config).path / "evaluation.json").read_text())["sources"]
    assert {name: row["loss"] for name, row in final.items()} == found[-1]["sources"]
    assert outcome.state["best_loss"] == min(row["loss"] for row in found)


def test_best_weights_are_those_of_the_best_step(data, whole):
    config, _ = whole
    found = rows(config)
    best = min(found, key=lambda row: row["loss"])
    (folder,) = (StageFolder.of(config).path / "best").iterdir()
    assert folder.name == f"step_{best['step']:08d}"
    assert read_state(folder).best_step == best["step"]
    layout = Layout.create(config.parallel, config.model.language)
    try:
        from nemovl_train.model.vlm import build_model

        model = build_model(config.model, layout, params_dtype=torch.float32, backend="torch", seed=1).eval()
        sealed.load(folder, model=model)
        nats = tokens = 0.0
        options = {"tokens_per_tile": 4, "split": "heldout", "max_samples": 4}
        for pack in heldout_packs(evaluation_data(config), "text", **options):
            with torch.no_grad():
                losses = model(PackBatch.from_pack(pack, layout))
            nats, tokens = nats + float(losses.double().sum()), tokens + int((pack.labels >= 0).sum())
    finally:
        layout.destroy()
    assert best["sources"]["text"] == pytest.approx(nats / tokens, rel=1e-6)


def test_it_decides_the_same_when_resumed(data, whole, tmp_path):
    config, outcome = whole
    cut = validated(data, tmp_path, every_steps=1, keep_best=True)
    assert running.run(cut, running.stop_at(3)).code == ExitCode.REQUEUE
    # A measurement that was made and lost again: the run died before it saved the step.
    path = StageFolder.of(cut).path / "validation.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 4, "loss": 0.0}) + "\n")
    running.assert_same_end(cut, running.run(cut), config, outcome)
    assert rows(cut) == rows(config)


def test_a_run_ends_early_and_is_done(data, tmp_path, losses):
    config = validated(data, tmp_path, every_steps=1, keep_best=True, patience=2)
    losses |= {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5}
    outcome = running.run(config)
    assert outcome.code == ExitCode.OK
    folder = StageFolder.of(config)
    assert (outcome.state["step"], outcome.state["best_step"], outcome.state["stale_validations"]) == (4, 2, 2)
    ending = ending_of(folder.path, config)
    assert ending is not None
    assert (ending.step, ending.best_step, ending.best_loss) == (4, 2, 2.0)
    assert [p.name for p in (folder.path / "best").iterdir()] == ["step_00000002"]
    assert folder.is_done()
    assert folder.last_checkpoint.name == "step_00000004"
    assert json.loads((folder.path / "evaluation.json").read_text())["step"] == 4
    assert trainer.run(config) == ExitCode.OK  # nothing left to do
    assert len(rows(config)) == 4


def test_other_options_open_a_finished_run_again(data, tmp_path, losses):
    config = validated(data, tmp_path, every_steps=1, patience=2)
    losses |= {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5, 5: 1.0, 6: 1.5}
    running.run(config)
    folder = StageFolder.of(config)
    assert folder.is_done()
    patient = replace(config, evaluation=replace(config.evaluation, patience=3))
    assert not StageFolder.of(patient).is_done()
    outcome = running.run(patient)
    assert min(outcome.digests) == 4
    assert (outcome.state["step"], outcome.state["best_step"]) == (6, 5)
    assert json.loads((folder.path / "evaluation.json").read_text())["step"] == 6
    assert StageFolder.of(patient).is_done()
    # Nothing is left to train with other held-out sets, but they are scored.
    sources = {"text": config.evaluation.sources["text"]}
    other = replace(patient, evaluation=replace(patient.evaluation, sources=sources, every_steps=0, patience=0))
    assert not StageFolder.of(other).is_done()
    assert not running.run(other).digests
    assert set(json.loads((folder.path / "evaluation.json").read_text())["sources"]) == {"text"}


def test_the_evaluation_of_a_shorter_run_is_not_that_of_a_longer_one(data, tmp_path, monkeypatch):
    short = validated(data, tmp_path)
    running.run(short)
    changes = ("trainer.steps",)
    longer = replace(short, trainer=replace(short.trainer, steps=STEPS + 2))
    longer = replace(longer, checkpoint=replace(longer.checkpoint, accept_changes=changes))
    with monkeypatch.context() as patch:
        patch.setattr("nemovl_train.training.trainer.evaluate_stage", interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.run(longer)
    assert (StageFolder.of(longer).last_checkpoint / "COMPLETE").is_file()
    assert not StageFolder.of(longer).is_done()
    running.run(longer)
    assert json.loads((StageFolder.of(longer).path / "evaluation.json").read_text())["step"] == STEPS + 2
    assert StageFolder.of(longer).is_done()


@pytest.mark.parametrize("step", [3, STEPS])
def test_a_stop_request_does_not_wait_for_a_measurement(data, whole, tmp_path, monkeypatch, step):
    config, outcome = whole
    cut = validated(data, tmp_path, every_steps=1, keep_best=True)
    score, scored, beats = evaluation.score_pack, [], []

    def asked_to_stop(*args, **options):
        scored.append(args)
        if len(scored) == PACKS * (step - 1) + 1:  # the first of them
            os.kill(os.getpid(), signal.SIGUSR1)
        return score(*args, **options)

    def count_beats(run):
        beat = run.watchdog.beat
        run.watchdog.beat = lambda **options: (beats.append(len(scored)), beat(**options))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_pack", asked_to_stop)
        assert running.run(cut, count_beats).code == ExitCode.REQUEUE
    assert len(scored) == PACKS * (step - 1) + 1
    assert set(beats) >= set(range(len(scored)))  # the watchdog hears of every pack
    assert [row["step"] for row in rows(cut)] == list(range(1, step))
    assert read_state(StageFolder.of(cut).checkpoints / f"step_{step:08d}").measured_step == step - 1
    running.assert_same_end(cut, running.run(cut), config, outcome)
    assert rows(cut) == rows(config)


def test_patience_counts_over_a_restart(data, tmp_path, losses):
    config = validated(data, tmp_path, every_steps=1, patience=3)
    losses |= {1: 2.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 1.0}
    assert running.run(config, running.stop_at(3)).code == ExitCode.REQUEUE
    outcome = running.run(config)
    assert (outcome.state["step"], outcome.state["best_step"]) == (4, 1)
    assert not (StageFolder.of(config).path / "best").exists()


def test_a_better_loss_starts_the_count_again(data, tmp_path, losses):
    config = validated(data, tmp_path, every_steps=1, patience=2)
    losses |= {1: 2.0, 2: 3.0, 3: 1.9, 4: 3.0, 5: 1.8, 6: 3.0}
    outcome = running.run(config)
    assert (outcome.state["step"], outcome.state["best_step"]) == (6, 5)
    assert ending_of(StageFolder.of(config).path, config).step == STEPS


def test_killed_between_the_end_and_its_evaluation(data, tmp_path, losses, monkeypatch):
    config = validated(data, tmp_path, every_steps=1, patience=1)
    losses |= {1: 2.0, 2: 3.0}

    with monkeypatch.context() as patch:
        patch.setattr("nemovl_train.training.trainer.evaluate_stage", interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.run(config)
    assert not StageFolder.of(config).is_done()
    outcome = running.run(config)
    assert outcome.state["step"] == 2
    assert not outcome.digests  # no step was taken again
    assert StageFolder.of(config).is_done()


def test_a_state_of_the_format_before_is_one_that_was_measured(tmp_path):
    state = TrainState(step=7, measured_step=6).to_json()
    assert TrainState.from_json(state, tmp_path).measured_step == 6
    before = {key: value for key, value in state.items() if key != "measured_step"} | {"format_version": 2}
    assert TrainState.from_json(before, tmp_path).measured_step == 7
    with pytest.raises(CheckpointError, match="state format 1"):
        TrainState.from_json({**before, "format_version": 1}, tmp_path)


def test_mean_of_the_sets():
    scores = {"a": Score(nats=10.0, tokens=5), "b": Score(nats=1.0, tokens=1), "empty": Score()}
    assert validation.mean_loss(scores) == pytest.approx(1.5)
    assert validation.mean_loss({"empty": Score()}) == math.inf
    assert validation.mean_loss({"a": Score(nats=math.nan, tokens=1)}) == math.inf
