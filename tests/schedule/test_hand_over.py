"""What a finished stage hands on, and what it is refused for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_schedule import compose, write_recipes

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.lineage import lineage_of
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.exceptions import CheckpointError, ConfigError, RunFailedError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.parallel.layout import Layout
from nemovl_train.schedule import chain
from nemovl_train.training import trainer
from nemovl_train.training.folder import resolve_checkpoint
from nemovl_train.training.trainer import Trainer


@pytest.fixture
def recipe(data, parts, tmp_path):
    return write_recipes(tmp_path / "recipes", data, parts)


@pytest.fixture(scope="module")
def finished(data, parts, tmp_path_factory):
    """Folder of a chain that ran through."""
    root = tmp_path_factory.mktemp("finished")
    recipe = write_recipes(root / "recipes", data, parts)
    assert chain.run(compose(recipe, root / "runs")) == ExitCode.OK
    return root / "runs" / "chain"


def ledger(run):
    return json.loads((run / "schedule.json").read_text())["stages"]


def test_a_stage_that_moved_a_frozen_part_is_not_handed_on(recipe, tmp_path, monkeypatch):
    """One weight of the frozen language model, changed by its last bit: no stage starts from that, however often."""
    account = Trainer._account

    def damaged(self, *args):
        account(self, *args)
        if self.state.step == 4 and self.config.run.stage == "first":
            weight = self.model.language_model.decoder.final_norm.weight.data
            weight[3] = torch.nextafter(weight[3], weight[3] + 1)

    monkeypatch.setattr(Trainer, "_account", damaged)
    config, run = compose(recipe, tmp_path / "runs"), tmp_path / "runs" / "chain"
    for _ in range(2):
        with pytest.raises(RunFailedError, match=r"1 tensors differ .*language_model\.decoder\.final_norm\.weight"):
            chain.run(config)
        monkeypatch.undo()  # the second time it is in the checkpoint
    record = json.loads((run / "first" / "handover.json").read_text())
    assert (record["frozen"], record["unchanged"]) == (["vision", "language"], ["vision"])
    assert [stage["state"] for stage in ledger(run)] == ["running", "pending"]


@pytest.mark.slow
def test_a_comparison_that_was_cut_off_is_made_up_for(recipe, tmp_path, monkeypatch):
    """Killed between the last checkpoint and the comparison: the stage is not taken for done."""
    config, run = compose(recipe, tmp_path / "runs"), tmp_path / "runs" / "chain"

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "hand_over", killed)
    with pytest.raises(KeyboardInterrupt):
        chain.run(config)
    assert (run / "first/checkpoints/step_00000004/COMPLETE").is_file()
    monkeypatch.undo()
    assert chain.run(config) == ExitCode.OK
    assert ledger(run)[0]["unchanged"] == ["vision", "language"]
    assert len((run / "first" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_parent_that_rotted_is_no_word_against_a_stage(recipe, tmp_path, monkeypatch, caplog):
    """One bit of the parent's file, flipped while its child trains: not compared, and not blamed on the training."""
    account = Trainer._account

    def rotting(self, *args):
        account(self, *args)
        if self.state.step == 4 and self.config.run.stage == "first":
            shard = max((Path(self.state.parent) / sealed.SHARDED).iterdir(), key=lambda path: path.stat().st_size)
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)

    monkeypatch.setattr(Trainer, "_account", rotting)
    config, run = compose(recipe, tmp_path / "runs"), tmp_path / "runs" / "chain"
    assert chain.run(config) == ExitCode.OK
    assert ledger(run)[0]["unchanged"] is None
    assert ledger(run)[1]["unchanged"] is not None
    assert "frozen parts are not compared" in caplog.text


def test_a_failed_start_leaves_no_record_of_its_parent(finished, tmp_path):
    """The record of a start that failed names a parent that the checkpoint does not have."""
    run = finished
    copy = shutil.copytree(run / "second", tmp_path / "alone")
    checkpoint = sorted((copy / "checkpoints").iterdir())[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"parent": None, "parent_seal": None}))
    assert (copy / "lineage.json").is_file()
    assert lineage_of(checkpoint) == []
    (checkpoint / "state.json").write_text(json.dumps(state | {"parent": "/gone/run/stage/checkpoints/step_00000001"}))
    (copy / "lineage.json").write_text("{")
    assert lineage_of(checkpoint) == [{"stage": "run/stage", "integrity": state["parent_seal"]}]


def test_a_stage_that_was_not_handed_on_is_refused_as_a_parent(finished, tmp_path):
    run = finished
    copy = shutil.copytree(run / "first", tmp_path / "first")
    record = json.loads((copy / "handover.json").read_text())
    (copy / "handover.json").write_text(json.dumps(record | {"changed_tensors": ["a.weight"]}))
    layout = Layout.create(ParallelConfig())
    with pytest.raises(CheckpointError, match=r"changed 1 of their tensors, a\.weight among them"):
        resolve_checkpoint(copy)
    with pytest.raises(CheckpointError, match="handover"):
        resolve_checkpoint(sorted((copy / "checkpoints").iterdir())[-1])
    layout.destroy()


def test_a_dry_run_is_no_stage_of_a_schedule(recipe, tmp_path):
    stage = recipe.parent / "second.yaml"
    stage.write_text(stage.read_text().replace("\ntrainer:\n", "\ntrainer:\n  dry_run: true\n"))
    with pytest.raises(ConfigError, match=r"stages\.1 .*dry_run trains nothing"):
        compose(recipe, tmp_path / "runs")
