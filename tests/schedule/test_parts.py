"""The parts that the demo pretrains for itself, and what they leave behind."""

import json
from dataclasses import replace

import pytest
import tiny_runs
import torch
from small_schedule import compose, write_recipes

from nemovl_train.config.compose import compose_run
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.exit_codes import ExitCode
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout
from nemovl_train.schedule import parts as module
from nemovl_train.schedule.tiny_tower import pretrain_tower
from nemovl_train.training.trainer import Trainer


@pytest.fixture
def schedule(data, parts, tmp_path):
    return compose(write_recipes(tmp_path / "recipes", data, parts), tmp_path)


def random_tiles():
    # Smooth pictures: their hidden patches can be guessed.
    small = torch.randint(0, 256, (16, 3, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    return torch.nn.functional.interpolate(small, size=64, mode="bilinear").to(torch.uint8)


def test_the_tower_learns_to_paint_what_it_does_not_see_and_repeats_itself():
    layout = Layout.create(ParallelConfig())
    try:
        losses = []
        for _ in range(2):
            config = replace(tiny_runs.MODEL, parts=("vision",))
            model = build_model(config, layout, params_dtype=torch.float32, backend="torch", seed=1)
            losses.append(pretrain_tower(model.vision_model, random_tiles(), seed=2, steps=12))
    finally:
        layout.destroy()
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_the_tower_is_made_once_with_its_curve(schedule, tmp_path, monkeypatch):
    pretrain = module.pretrain_tower
    monkeypatch.setattr(module, "_pictures", lambda *args: random_tiles())
    monkeypatch.setattr(module, "pretrain_tower", lambda tower, tiles, seed: pretrain(tower, tiles, seed=seed, steps=3))
    module._make_vision(schedule, tmp_path)
    assert HFFolder(tmp_path / "parts" / "vision_hf").kind == "vision"
    curve = tmp_path / "parts" / "vision_pretrain" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in curve.read_text().splitlines()] == [1, 2, 3]
    monkeypatch.setattr(module, "pretrain_tower", None)
    module._make_vision(schedule, tmp_path)


def test_the_language_model_is_made_once_and_a_stop_is_handed_on(schedule, data, tmp_path, monkeypatch):
    language = replace(tiny_runs.MODEL.language, vocab_size=tiny_runs.BASE_VOCAB)
    run = tiny_runs.run_config(data, tmp_path, sources=("text",), steps=2, train=("language",))
    run = replace(run, model=replace(run.model, parts=("language",), language=language))
    asked = {}

    def composed(name, values):
        asked.update(values)
        return run

    monkeypatch.setattr(module, "compose_run", composed)
    monkeypatch.setattr(module, "base_tokenizer", lambda source, out: tiny_runs.write_tokenizer(out, tags=()))
    schedule = replace(schedule, seed=77)
    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "fit", lambda self: ExitCode.REQUEUE)
        assert module._make_language(schedule, tmp_path) == ExitCode.REQUEUE
    assert asked["trainer.seed"] == 77
    assert compose_run("tiny/parts/language", values=asked).trainer.seed == 77
    assert not (tmp_path / "parts" / "language_hf").exists()
    assert module._make_language(schedule, tmp_path) == ExitCode.OK
    assert HFFolder(tmp_path / "parts" / "language_hf").kind == "language"
    monkeypatch.setattr(module.trainer, "run", None)
    assert module._make_language(schedule, tmp_path) == ExitCode.OK
