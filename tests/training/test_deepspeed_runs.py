"""DeepSpeed's engine against megatron-core's on two ranks, and whole runs against themselves after a stop."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import running
import tiny_runs
import torch
from deepspeed_forms import INSTALLED, WHY_NOT, all_equal, everything, needs_deepspeed, with_engine

from nemovl_train.checkpoint import saving, sealed
from nemovl_train.checkpoint.files import sha256
from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.convert.checkpoints import checkpoint_tensors, export_checkpoint, find_checkpoint
from nemovl_train.exit_codes import ExitCode
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout
from nemovl_train.training import deepspeed_engine
from nemovl_train.training.folder import StageFolder

pytestmark = [pytest.mark.slow, needs_deepspeed]

ROOT = Path(__file__).parents[2]
FORMS = ["1/fp32", "2/fp32", "3/fp32", "2/fp32/offload", "3/fp32/offload", "3/fp32/optimizer", "3/fp32/recompute"]
MIXED = ["2/bf16", "3/bf16", "3/bf16/offload", "3/bf16/optimizer"]


@pytest.fixture(autouse=True)
def _nothing_persistent(monkeypatch):
    """Everything is small here, and with stage 3 would be kept whole."""
    monkeypatch.setattr(deepspeed_engine, "PERSISTENT_ELEMENTS", 0)


def two_ranks(command: list[str]) -> list[str]:
    """Standard error of both processes, which have to succeed or die by SIGKILL as they mean to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    base = {**os.environ, **address, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    started = [
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**base, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=400)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert {process.returncode for process in started} <= {0, ExitCode.REQUEUE, -signal.SIGKILL}, texts
    return texts


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """What each engine gave on each of two ranks."""
    if not INSTALLED:
        pytest.skip(WHY_NOT)
    out = tmp_path_factory.mktemp("compared") / "out.json"
    names = ["megatron/fp32", *FORMS, "2/fp32/averaged", "3/fp32/averaged", "megatron/bf16", *MIXED]
    names += ["megatron/bf16/rounded"]
    two_ranks([str(Path(__file__).with_name("deepspeed_ranks.py")), str(data), str(out), *names])
    return [json.loads(out.with_name(f"{out.name}.{rank}").read_text()) for rank in range(2)]


def furthest(one: dict, other: dict, key: str) -> float:
    return max(abs(a - b) for a, b in zip(one[key], other[key], strict=True))


def test_images_are_on_one_rank_only_and_not_in_every_step(compared):
    ours, theirs = (found["megatron/fp32"]["own_tiles"] for found in compared)
    assert not any(map(any, ours))
    # Two images of a pack go through the tower one by one here: ranks differ in calls, not only in having any.
    assert {0, 1, 2} <= {tiles for step in theirs for tiles in step}
    assert any(not any(step) for step in theirs)


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_equal_megatron_cores(compared, form):
    for found in compared:
        assert furthest(found[form], found["megatron/fp32"], "loss") <= 1e-5
        assert furthest(found[form], found["megatron/fp32"], "norm") <= 1e-5
    assert min(compared[0][form]["norm"]) > 0.5  # every step was clipped


@pytest.mark.parametrize("form", ["2/fp32/averaged", "3/fp32/averaged"])
def test_the_comparison_notices_gradients_that_are_averaged(compared, form):
    found = compared[0]
    assert furthest(found[form], found["megatron/fp32"], "norm") > 0.5


@pytest.mark.parametrize("form", MIXED)
def test_bfloat16_is_the_same_model_with_the_same_float32_parameters(compared, form):
    found, expected = compared[0][form], compared[0]["megatron/bf16"]
    assert found["dtypes"] == ["torch.float32", "torch.bfloat16"]
    # The same forward pass before the first update; then gradients are rounded to bfloat16 in another order.
    assert found["loss"][0] == expected["loss"][0]
    assert compared[0]["megatron/bf16/rounded"]["loss"][0] != expected["loss"][0]
    assert furthest(found, expected, "loss") < 1e-3
    assert furthest(found, expected, "norm") < 5e-3


def captured(config, prepare=lambda trainer: None):
    """Exit code of a run, and all of its weights and optimizer state at the end."""
    tensors: dict[str, torch.Tensor] = {}

    def watch(trainer):
        prepare(trainer)
        close = trainer.engine.close

        def closing():
            tensors.update(everything(trainer.engine))
            close()

        trainer.engine.close = closing

    return running.run(config, watch).code, tensors


@pytest.mark.parametrize("form", ["1/fp32", "2/bf16", "3/fp32", "3/bf16/offload"])
def test_a_stopped_run_goes_on_bitwise(data, tmp_path, form):
    whole = with_engine(tiny_runs.run_config(data, tmp_path / "whole", steps=5), form)
    code, expected = captured(whole)
    assert code == ExitCode.OK
    halved = with_engine(tiny_runs.run_config(data, tmp_path / "halved", steps=5), form)
    code, early = captured(halved, running.stop_at(3))
    assert code == ExitCode.REQUEUE
    assert not all_equal(early, expected)
    code, found = captured(halved)
    assert code == ExitCode.OK
    assert all_equal(found, expected)
    assert running.rows(halved) == running.rows(whole)
    assert "optimizer.deepspeed.steps" in found
    assert ("optimizer.float32.exp_avg.language_model.decoder.layers.0.mixer.A_log" in found) == ("bf16" in form)


DRIVER = """
import os, signal, sys
from pathlib import Path
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exit_codes import guarded
from nemovl_train.training import deepspeed_engine, trainer
deepspeed_engine.PERSISTENT_ELEMENTS = 0
account = trainer.Trainer._account
def accounted(self, *args):
    account(self, *args)
    if self.state.step == int(sys.argv[2]):
        os.kill(os.getpid(), int(sys.argv[3]))
trainer.Trainer._account = accounted
sys.exit(guarded(lambda: trainer.run(load_yaml(RunConfig, Path(sys.argv[1])))))
"""


def start(config, tmp_path, *, signal_at: int = -1, number: int = signal.SIGKILL) -> None:
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    two_ranks(["-c", DRIVER, str(tmp_path / "config.yaml"), str(signal_at), str(int(number))])


def tensors_of(config) -> dict[str, torch.Tensor]:
    return dict(checkpoint_tensors(StageFolder.of(config).path)[1])


@pytest.mark.parametrize("form", ["2/fp32", "3/bf16/offload"])
def test_two_ranks_killed_between_saves_end_as_if_they_had_not_been(data, tmp_path, form):
    whole = with_engine(tiny_runs.run_config(data, tmp_path / "whole", steps=6), form)
    start(whole, tmp_path)
    killed = with_engine(tiny_runs.run_config(data, tmp_path / "killed", steps=6), form)
    start(killed, tmp_path, signal_at=5)
    assert [path.name for path in sealed.published(StageFolder.of(killed).checkpoints)][-1] == "step_00000004"
    start(killed, tmp_path)
    assert all_equal(tensors_of(killed), tensors_of(whole))
    by_step = {row["step"]: row for row in running.rows(killed)}
    assert by_step == {row["step"]: row for row in running.rows(whole)}


@pytest.mark.parametrize("form", ["2/fp32", "3/fp32"])
def test_a_run_of_two_ranks_goes_on_in_one(data, tmp_path, form):
    alone = with_engine(tiny_runs.run_config(data, tmp_path / "alone", steps=4), form)
    captured(alone)
    moving = with_engine(tiny_runs.run_config(data, tmp_path / "moving", steps=4), form)
    start(moving, tmp_path, signal_at=2, number=signal.SIGTERM)
    code, _ = captured(moving)
    assert code == ExitCode.OK
    losses = [[row["loss"] for row in running.rows(config)] for config in (moving, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_stage_3_is_evaluated_as_any_other_run(data, tmp_path):
    """At its end, and while it trains: what comes after such a look is what comes without."""
    scores, heldout, ends = [], [], []
    for number, form in enumerate(("1/fp32", "3/fp32")):
        config = with_engine(tiny_runs.run_config(data, tmp_path / str(number), steps=3), form)
        config = tiny_runs.with_evaluation(config, data)
        config = replace(config, evaluation=replace(config.evaluation, every_steps=1, keep_best=True))
        ends.append(captured(config)[1])
        path = StageFolder.of(config).path
        scores.append(json.loads((path / "evaluation.json").read_text())["sources"]["pictures"])
        heldout.append([json.loads(line) for line in (path / "validation.jsonl").read_text().splitlines()])
        best = sealed.published(path / "best")
        assert [folder.name for folder in best] == [f"step_{heldout[-1][-1]['best_step']:08d}"]
        model = dict(checkpoint_tensors(best[0])[1])
        assert model.keys() == tensors_of(config).keys()
    assert scores[1] == {**scores[0], "loss": pytest.approx(scores[0]["loss"], rel=1e-5)}
    assert [row["loss"] for row in heldout[1]] == pytest.approx([row["loss"] for row in heldout[0]], rel=1e-5)
    plain = with_engine(tiny_runs.run_config(data, tmp_path / "plain", steps=3), "3/fp32")
    assert all_equal(captured(plain)[1], ends[1])


@pytest.mark.parametrize("form", ["2/bf16", "3/fp32"])
def test_a_save_in_the_background_is_that_of_its_step(data, tmp_path, form):
    """Two ranks go on training while it is written."""
    saved = []
    for background in (True, False):
        config = with_engine(tiny_runs.run_config(data, tmp_path / str(background), steps=4), form)
        options = replace(config.checkpoint, every_steps=2, keep_last=2, in_background=background)
        config = replace(config, checkpoint=options)
        start(config, tmp_path)
        folder = sealed.step_folder(StageFolder.of(config).checkpoints, 2)
        saved.append({path.name: sha256(path) for path in (folder / "sharded").iterdir()})
    assert saved[0] == saved[1]


@pytest.mark.parametrize("form", ["2/bf16", "3/bf16/offload"])
def test_the_export_is_that_of_the_same_weights(data, tmp_path, form):
    config = with_engine(tiny_runs.run_config(data, tmp_path / "run", steps=2), form)
    captured(config)
    source = StageFolder.of(config).path
    exported = export_checkpoint(source, tmp_path / "exported")
    layout = Layout.create(ParallelConfig())
    model = build_model(config.model, layout, params_dtype=torch.bfloat16, backend="torch", seed=99)
    checkpoint = find_checkpoint(source)
    state = sealed.load(checkpoint, model=model)
    run_id = StageFolder.of(config).run_id
    for step, change in ((2, 0.0), (3, 1.0)):
        with torch.no_grad():
            model.projector.norm.weight.view(-1)[0] += change
        root = tmp_path / f"plain{step}" / "mini" / "train"
        root.mkdir(parents=True)
        (root / "config.yaml").write_text((source / "config.yaml").read_text())
        saving.save(root / "checkpoints", 2, model=model, optimizer=None, state=state, run_id=run_id)
    layout.destroy()
    hashes = [
        {path.name: sha256(path) for path in folder.glob("*.safetensors")}
        for folder in (
            exported,
            *(export_checkpoint(tmp_path / f"plain{n}/mini/train", tmp_path / f"plain_hf{n}") for n in (2, 3)),
        )
    ]
    assert hashes[0]
    assert hashes[0] == hashes[1] != hashes[2]
