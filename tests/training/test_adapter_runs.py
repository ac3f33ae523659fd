"""Runs with adapters: what moves and what does not, what is saved, exact resume, and the reference to the base."""

import json
import shutil
from dataclasses import replace

import pytest
import running
import tiny_runs
import torch

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import base_of
from nemovl_train.config.schema import AdapterConfig, AdapterTargets, PartScales
from nemovl_train.config.validate import validate_run
from nemovl_train.exceptions import CheckpointError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.training.folder import StageFolder

STEPS = 6
ADAPTER = AdapterConfig(rank=3, alpha=6.0, targets=AdapterTargets(vision=("linear_fc*",), language=("*",)))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A stage whose weights the adapters stand on, its config and tensors."""
    config = tiny_runs.run_config(data, tmp_path_factory.mktemp("base"), steps=2)
    return StageFolder.of(config).path, running.run(config).tensors


def adapted(data, root, base, **changed):
    config = tiny_runs.run_config(data, root, init_from=str(base[0]), train=("projector",), steps=STEPS)
    config = replace(config, run=replace(config.run, stage="adapters"), adapter=ADAPTER, **changed)
    assert validate_run(config) == []
    return config


@pytest.fixture(scope="module")
def whole(data, base, tmp_path_factory):
    """A run with adapters from beginning to end."""
    config = adapted(data, tmp_path_factory.mktemp("whole"), base)
    outcome = running.run(config)
    assert outcome.code == ExitCode.OK
    return config, outcome


def test_the_base_is_bit_identical_and_the_rest_moves(base, whole):
    tensors = whole[1].tensors
    names = [name for name in base[1] if name.startswith(("vision_model", "projector", "language_model"))]
    assert names
    for name in names:
        assert torch.equal(tensors[name], base[1][name]) == (not name.startswith("projector")), name
    pairs = {name: tensor for name, tensor in tensors.items() if ".adapter." in name}
    assert {name.rpartition(".adapter.")[0].rpartition(".")[2] for name in pairs} == {
        *("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    }
    assert all(tensor.any() for name, tensor in pairs.items() if name.endswith("lora_b")), "a pair was never used"
    assert not any("vision_model" in name and "self_attention" in name for name in pairs)


def test_frozen_weights_have_no_optimizer_state(whole):
    tensors = whole[1].tensors
    trained = sum(t.numel() for n, t in tensors.items() if n.startswith("projector") or ".adapter." in n)
    moments = sum(t.numel() for n, t in tensors.items() if n.endswith("exp_avg"))
    assert trained <= moments <= 1.2 * trained  # the distributed optimizer pads its buffers


def test_a_checkpoint_holds_what_trains_and_names_the_rest(base, whole):
    folder = StageFolder.of(whole[0]).last_checkpoint
    state = json.loads((folder / "state.json").read_text())
    assert base_of(folder) == sealed.latest(base[0] / "checkpoints")
    assert state["parent_seal"] == sealed.seal_of(base_of(folder))
    keys = (folder / "sharded/index.json").read_text()
    assert "lora_a" in keys
    assert "language_model.embedding" not in keys


@pytest.mark.parametrize("step", [1, 4])
def test_stopped_and_resumed_it_is_the_same_run(data, base, whole, tmp_path, step):
    config = adapted(data, tmp_path, base)
    assert running.run(config, running.stop_at(step)).code == ExitCode.REQUEUE
    second = running.run(config)
    assert second.code == ExitCode.OK
    running.assert_same_end(config, second, *whole)


def test_it_resumes_on_a_base_that_was_moved_and_is_named(data, base, whole, tmp_path):
    moved = shutil.copytree(base[0], tmp_path / "base")
    config = adapted(data, tmp_path, (moved, base[1]))
    assert running.run(config, running.stop_at(2)).code == ExitCode.REQUEUE
    moved.rename(tmp_path / "elsewhere")
    config = replace(
        config,
        trainer=replace(config.trainer, init_from=str(tmp_path / "elsewhere")),
        checkpoint=replace(config.checkpoint, accept_changes=("trainer.init_from",)),
    )
    second = running.run(config)
    assert second.code == ExitCode.OK
    assert all(torch.equal(tensor, whole[1].tensors[name]) for name, tensor in second.tensors.items())


@pytest.mark.parametrize("what", ["gone", "another"])
def test_it_does_not_resume_on_another_base(data, base, tmp_path, what):
    moved = tmp_path / "base"
    shutil.copytree(base[0], moved)
    config = adapted(data, tmp_path, (moved, base[1]))
    assert running.run(config, running.stop_at(2)).code == ExitCode.REQUEUE
    shutil.rmtree(moved)
    if what == "another":
        other = tiny_runs.run_config(data, tmp_path / "other", steps=2, seed=5)
        running.run(other)
        shutil.copytree(StageFolder.of(other).path, moved)
    with pytest.raises(CheckpointError, match=r"bring that (checkpoint|one) back"):
        running.run(config)


def test_adapters_are_no_model_to_start_from(data, whole, tmp_path):
    config = tiny_runs.run_config(data, tmp_path, init_from=str(StageFolder.of(whole[0]).path))
    with pytest.raises(CheckpointError, match="nemovl convert merge"):
        running.run(config)


def test_what_trains_is_shown_first(data, base, tmp_path, caplog):
    caplog.set_level("INFO")
    config = adapted(data, tmp_path, base)
    config = replace(config, optim=replace(config.optim, lr_scale=PartScales(projector=0.1)))
    outcome = running.run(config, running.stop_at(1))
    (table,) = [record.message for record in caplog.records if record.message.startswith("what trains")]
    rows = {words[0]: words for line in table.splitlines()[2:] if (words := line.split())}
    pairs = sum(t.numel() for n, t in outcome.tensors.items() if "language_model" in n and ".adapter." in n)
    own = sum(t.numel() for n, t in outcome.tensors.items() if n.startswith("projector"))
    assert rows["language"][2:5] == ["0", f"{pairs:,}", "0.003"]
    assert rows["projector"][1:5] == ["0", f"{own:,}", "0", "0.0003"]
    assert " ".join(rows["vision"][5:]) == "1 linear_fc1, 1 linear_fc2"
