"""What a run does with its folder, its parent and steps that are not finite."""

import errno
import fcntl
import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import running
import tiny_runs
import torch

from data_pipelines.exceptions import DataError
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import EvalConfig, RunConfig
from nemovl_train.exceptions import CheckpointError, ConfigError, UserError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.training import trainer
from nemovl_train.training.folder import StageFolder
from nemovl_train.training.token_ids import refuse_other_ids


@pytest.fixture
def config(data, tmp_path):
    return tiny_runs.run_config(data, tmp_path, steps=3)


def test_a_stage_that_is_over_leaves_no_memory_to_the_next_one(config, data):
    watched = []

    def watch(run):
        watched.extend(weakref.ref(one) for one in (run, run.engine, next(run.model.parameters()), run.stream))

    running.run(tiny_runs.with_evaluation(config, data), watch)
    for _ in range(2):  # a tensor that C++ holds too is let go by the first pass, and freed by the second
        gc.collect()
    assert [one() is None for one in watched] == [True] * 4


def test_a_run_leaves_its_folder_and_a_second_one_finds_nothing_to_do(config, data):
    config = tiny_runs.with_evaluation(config, data)
    assert trainer.run(config) == ExitCode.OK
    path = StageFolder.of(config).path
    assert load_yaml(RunConfig, path / "config.yaml") == config
    rows = running.rows(config)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["tokens_seen"] == sum(row["tokens"] for row in rows)
    assert [event["folder"] for event in running.events(config, "checkpoint")] == ["step_00000002", "step_00000003"]
    assert len(running.events(config, "end")) == 1
    score = json.loads((path / "evaluation.json").read_text())
    assert score["step"] == 3
    assert score["sources"]["pictures"]["samples"] == 4
    (prediction,) = json.loads((path / "predictions.json").read_text())
    assert [(path / name).is_file() for name in prediction["images"]] == [True]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    assert trainer.run(config) == ExitCode.OK
    after = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    assert {file.name for file in after if after[file] != before.get(file)} <= {"config.yaml", ".lock"}


def test_options_that_decide_nothing_may_change_and_others_are_refused_with_their_difference(config):
    trainer.run(config)
    assert trainer.run(replace(config, checkpoint=replace(config.checkpoint, keep_last=1))) == ExitCode.OK
    other = replace(config, optim=replace(config.optim, lr=0.5), trainer=replace(config.trainer, seed=7))
    with pytest.raises(ConfigError) as error:
        trainer.run(other)
    text = str(error.value)
    assert "optim.lr: 0.003 -> 0.5" in text
    assert "trainer.seed: 1234 -> 7" in text
    assert "choose another run.stage" in text
    assert load_yaml(RunConfig, StageFolder.of(config).path / "config.yaml").optim.lr == 0.003


def test_a_held_out_set_that_is_not_there_stops_a_run_before_its_first_step(config, data):
    missing = replace(config, evaluation=EvalConfig(sources={"pictures": str(data / "pictured")}))
    with pytest.raises(DataError, match="pictured"):
        running.run(missing)
    assert not (StageFolder.of(missing).path / "metrics.jsonl").exists()
    no_split = replace(config, evaluation=EvalConfig(sources={"text": str(data / "text")}, split="validation"))
    with pytest.raises(DataError, match="validation"):
        running.run(no_split)


def test_a_start_that_failed_before_its_first_step_leaves_the_folder_to_the_corrected_one(config, tmp_path):
    misspelt = replace(config, trainer=replace(config.trainer, init_from=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match="no complete checkpoint here"):
        trainer.run(misspelt)
    assert trainer.run(config) == ExitCode.OK


def test_a_run_whose_metrics_are_gone_is_still_not_overwritten(config):
    trainer.run(config)
    (StageFolder.of(config).path / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003 -> 0\.5"):
        trainer.run(replace(config, optim=replace(config.optim, lr=0.5)))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written(config, monkeypatch, number):
    def refuse(self, *args, **kwargs):
        raise OSError(number, "no", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"not writable.*run\.root"):
        trainer.run(config)


def test_a_file_where_the_folder_should_be(config, tmp_path):
    (tmp_path / "mini").write_text("in the way")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        trainer.run(config)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_an_unknown_parent(config, tmp_path, name):
    child = replace(config, trainer=replace(config.trainer, init_from=str(tmp_path / name)))
    with pytest.raises(CheckpointError, match=r"no complete checkpoint here \(trainer\.init_from takes"):
        trainer.run(child)


def test_a_parent_of_another_size(config, tmp_path):
    trainer.run(config)
    wide = replace(config.model, projector=replace(config.model.projector, ffn_hidden_size=48))
    child = replace(
        config,
        run=replace(config.run, stage="child"),
        model=wide,
        trainer=replace(config.trainer, init_from=str(StageFolder.of(config).path)),
    )
    with pytest.raises(CheckpointError, match="does not fit this model"):
        trainer.run(child)


@pytest.mark.parametrize("how", ["stage", "checkpoints", "checkpoint"])
def test_a_child_starts_from_its_parents_weights_with_everything_else_fresh(config, how):
    parent = running.run(config)
    folder = StageFolder.of(config)
    source = {"stage": folder.path, "checkpoints": folder.checkpoints, "checkpoint": folder.last_checkpoint}[how]
    settings = replace(config.trainer, init_from=str(source), seed=99, train=("projector",))
    child = replace(config, run=replace(config.run, stage="child"), trainer=settings)
    outcome = running.run(child)
    assert outcome.state["parent"] == str(folder.last_checkpoint)
    assert outcome.state["step"] == 3
    frozen = [name for name in outcome.tensors if name.startswith(("vision_model.", "language_model."))]
    assert all(torch.equal(outcome.tensors[name], parent.tensors[name]) for name in frozen)
    assert [name for name in outcome.tensors if name.startswith("language.")] == []
    assert not torch.equal(
        outcome.tensors["projector.linear_fc1.weight"], parent.tensors["projector.linear_fc1.weight"]
    )
    assert running.rows(child)[0]["lr"] == running.rows(config)[0]["lr"]


def test_a_damaged_parent_is_named(config):
    trainer.run(config)
    folder = StageFolder.of(config)
    (folder.last_checkpoint / "state.json").write_text("{}")
    settings = replace(config.trainer, init_from=str(folder.last_checkpoint))
    child = replace(config, run=replace(config.run, stage="child"), trainer=settings)
    with pytest.raises(CheckpointError, match=r"step_00000003/state\.json.*remove .*step_00000003"):
        trainer.run(child)


def poisoned(*steps):
    """Packs of these steps carry a weight that is not a number."""

    def prepare(run):
        take = run._next_packs

        def poison():
            packs, seconds = take()
            if run.state.step + 1 in steps:
                packs = [replace(packs[0], loss_weight=packs[0].loss_weight * math.nan), *packs[1:]]
            poison.keys = [key for pack in packs for key in pack.sample_keys]
            return packs, seconds

        run._next_packs = poison

    return prepare


def test_bad_steps_are_skipped_and_named(config):
    outcome = running.run(config, poisoned(2))
    assert outcome.state["bad_steps"] == 1
    rows = running.rows(config)
    assert [row["applied"] for row in rows] == [True, False, True]
    assert rows[1]["loss"] is None
    (event,) = running.events(config, "skipped_step")
    assert (event["step"], event["loss"]) == (2, "nan")
    keys = [key for key in event["samples"] if key.startswith(("text-", "pictures-"))]
    assert len(keys) == len(event["samples"]) == rows[1]["samples"]


def test_too_many_bad_steps_end_the_run_with_the_last_one_named(config):
    config = replace(config, trainer=replace(config.trainer, max_bad_steps=1))
    with pytest.raises(UserError, match=r"max_bad_steps=1.*events\.jsonl"):
        running.run(config, poisoned(1, 2))
    assert [event["step"] for event in running.events(config, "skipped_step")] == [1, 2]
    assert not StageFolder.of(config).is_done()


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_later(config, monkeypatch):
    from nemovl_train.checkpoint import sealed

    write = sealed.write_hashed

    def full(path, text):
        if "step_00000003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, text)

    monkeypatch.setattr(sealed, "write_hashed", full)
    with pytest.raises(CheckpointError, match=r"no space left in .*checkpoints.*run the same command again"):
        trainer.run(config)
    checkpoints = StageFolder.of(config).checkpoints
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    monkeypatch.undo()
    assert trainer.run(config) == ExitCode.OK
    assert [row["step"] for row in running.rows(config)] == [1, 2, 3]


class Closed:
    """Notes what a run closes; the line of progress fails at it."""

    def __init__(self, run, *, failing):
        self.names = []
        metrics, progress = run.callbacks
        for name, thing in (("metrics", metrics), ("progress", progress), ("stream", run.stream)):
            thing.close = self._noting(name, thing.close, failing=failing and name == "progress")

    def _noting(self, name, close, *, failing):
        def noted():
            self.names.append(name)
            close()
            if failing:
                raise OSError(errno.EIO, "the terminal is gone")

        return noted


def test_a_full_disk_under_the_metrics_says_so_and_everything_is_closed(config):
    def prepare(run):
        metrics = run.callbacks[0]
        start = metrics.on_start

        def on_a_full_disk(trainer):
            start(trainer)
            metrics.metrics.close()
            metrics.metrics = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115 (the callback closes it)

        metrics.on_start = on_a_full_disk
        prepare.closed = Closed(run, failing=False)

    with pytest.raises(CheckpointError, match=r"no space left in .*run the same command again"):
        running.run(config, prepare)
    assert sorted(prepare.closed.names) == ["metrics", "progress", "stream"]


def test_closing_goes_on_after_a_failure(config):
    def prepare(run):
        prepare.closed = Closed(run, failing=True)

    with pytest.raises(OSError, match="the terminal is gone"):
        running.run(config, prepare)
    assert sorted(prepare.closed.names) == ["metrics", "progress", "stream"]


def test_a_folder_in_use_is_refused_and_free_again_afterwards(config):
    def second_process(run):
        with pytest.raises(
            CheckpointError, match=r"is in use by another process \(process \d+ on .*\): wait until it ends, or stop it"
        ):
            StageFolder.of(config).claim()

    assert running.run(config, second_process).code == ExitCode.OK
    assert trainer.run(config) == ExitCode.OK
    other = replace(config, optim=replace(config.optim, lr=0.5))
    with pytest.raises(ConfigError):
        trainer.run(other)
    assert trainer.run(config) == ExitCode.OK


def test_accepted_changes_are_listed_and_the_run_goes_on(config, caplog):
    running.run(config, running.stop_at(2))
    other = replace(config, optim=replace(config.optim, lr=0.5), trainer=replace(config.trainer, spike_sigma=9.0))
    with pytest.raises(ConfigError, match=r"'checkpoint\.accept_changes=\[optim\.lr,trainer\.spike_sigma\]'"):
        trainer.run(other)
    half = replace(other, checkpoint=replace(other.checkpoint, accept_changes=("optim.lr",)))
    with pytest.raises(ConfigError, match=r"another run: trainer\.spike_sigma: 0\.0 -> 9\.0") as error:
        trainer.run(half)
    assert "optim.lr: " not in str(error.value)
    accepted = replace(other, checkpoint=replace(other.checkpoint, accept_changes=("optim", "trainer.spike_sigma")))
    assert running.run(accepted, running.stop_at(2)).code == ExitCode.OK
    assert "continuing with another option, as allowed: optim.lr: 0.003 -> 0.5" in caplog.text
    assert [row["step"] for row in running.rows(config)] == [1, 2, 3]
    # From here on the new options are the run's.
    assert trainer.run(other) == ExitCode.OK
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.5 -> 0\.003"):
        trainer.run(config)


def test_a_file_system_without_locks_is_used_with_a_warning(config, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert trainer.run(config) == ExitCode.OK
    assert "cannot be locked (not supported)" in caplog.text


def test_ids_that_the_tokenizer_does_not_have_are_all_named(config):
    tokens = replace(config.model.tokens, eos=11, image_end=5)
    with pytest.raises(ConfigError) as error:
        trainer.run(replace(config, model=replace(config.model, tokens=tokens)))
    text = str(error.value)
    assert "model.tokens.eos=11: " in text
    assert "has <SPECIAL_12> at 12" in text
    assert "model.tokens.image_end=5: " in text
    assert "model.tokens.pad" not in text


def test_media_ids_do_not_matter_without_a_tower(config):
    tokens = replace(config.model.tokens, image=7)
    with pytest.raises(ConfigError, match=r"model\.tokens\.image=7"):
        refuse_other_ids(replace(config.model, tokens=tokens), config.data.tokenizer)
    refuse_other_ids(replace(config.model, tokens=tokens, parts=("language",)), config.data.tokenizer)
