"""What a run does with its folder, its parent and steps that are not finite."""

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import running
import tiny_runs
import torch

from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import CheckpointError, ConfigError, UserError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.training import trainer
from nemovl_train.training.folder import StageFolder


@pytest.fixture
def config(data, tmp_path):
    return tiny_runs.run_config(data, tmp_path, steps=3)


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
    assert {file.name for file in after if after[file] != before.get(file)} <= {"config.yaml"}


def test_options_that_decide_nothing_may_change_and_others_are_refused_with_their_difference(config):
    trainer.run(config)
    assert trainer.run(replace(config, checkpoint=replace(config.checkpoint, keep_last=1))) == ExitCode.OK
    other = replace(config, optim=replace(config.optim, lr=0.5), trainer=replace(config.trainer, seed=7))
    with pytest.raises(ConfigError) as error:
        trainer.run(other)
    text = str(error.value)
    assert "optim.lr: 0.003 -> 0.5" in text
    assert "trainer.seed: 1234 -> 7" in text
    assert "choose another run.name" in text
    assert load_yaml(RunConfig, StageFolder.of(config).path / "config.yaml").optim.lr == 0.003


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

    write = sealed._write

    def full(path, text):
        if "step_00000003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(sealed, "_write", full)
    with pytest.raises(CheckpointError, match=r"no space left in .*checkpoints.*run the same command again"):
        trainer.run(config)
    checkpoints = StageFolder.of(config).checkpoints
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    monkeypatch.undo()
    assert trainer.run(config) == ExitCode.OK
    assert [row["step"] for row in running.rows(config)] == [1, 2, 3]
