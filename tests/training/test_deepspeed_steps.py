"""DeepSpeed's engine, step by step in one process: bad steps, frozen parts, a look at the whole model."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from deepspeed_forms import all_equal, everything, needs_deepspeed, with_engine
from test_optimizer import steps_of

from nemovl_train.config.schema import OptimConfig
from nemovl_train.exceptions import UserError
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import build_model
from nemovl_train.training import deepspeed_engine
from nemovl_train.training.engine import open_engine
from nemovl_train.training.micro_batches import StepDroppedError
from nemovl_train.training.step import Limits, train_step


@pytest.fixture(autouse=True)
def _nothing_persistent(monkeypatch):
    """Everything is small here, and with stage 3 would be kept whole."""
    monkeypatch.setattr(deepspeed_engine, "PERSISTENT_ELEMENTS", 0)


@pytest.fixture
def opened(layout):
    """Opens engines around equal models and closes them."""
    engines = []

    def open_one(form: str, data: Path, train=("vision", "projector", "language")):
        config = with_engine(tiny_runs.run_config(data, data), form)
        config = replace(config, optim=OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-5, clip_grad=0.7))
        model = build_model(config.model, layout, params_dtype=DTYPES[config.precision.params], backend="torch", seed=5)
        model.freeze(train)
        engines.append(open_engine(model, layout, config))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("form", ["1/fp32", "2/bf16", "2/fp32/offload", "3/fp32", "3/bf16/offload", "3/bf16/optimizer"])
@pytest.mark.parametrize("where", ["loss", "gradient", "float32 gradient"])
def test_a_step_that_is_not_finite_changes_nothing(layout, data, opened, form, where):
    if where == "float32 gradient" and "bf16" not in form:
        pytest.skip("everything is float32")
    engine = opened(form, data)
    first, second, third = steps_of(data, 3)
    train_step(engine, first, layout, lr=1e-3, divisor="global")
    before = everything(engine)
    hook = None
    if where == "loss":
        second = [second[0], replace(second[1], loss_weight=torch.full_like(second[1].loss_weight, math.nan))]
    elif where == "gradient":
        hook = engine.model.projector.linear_fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    else:
        mixer = engine.model.language_model.decoder.layers[0].mixer
        hook = mixer.A_log.register_hook(lambda gradient: gradient * math.nan)
    result = train_step(engine, second, layout, lr=1e-3, divisor="global")
    if hook is not None:
        hook.remove()
        assert math.isfinite(result.loss)
    assert not result.applied
    assert all_equal(everything(engine), before)
    found = train_step(engine, third, layout, lr=1e-3, divisor="global")
    # As if the bad step had never been.
    other = opened(form, data)
    train_step(other, first, layout, lr=1e-3, divisor="global")
    expected = train_step(other, third, layout, lr=1e-3, divisor="global")
    assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert all_equal(everything(engine), everything(other))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("form", ["1/fp32", "2/bf16", "2/fp32/offload", "3/fp32", "3/bf16/offload", "3/bf16/optimizer"])
@pytest.mark.parametrize("what", ["spike", "dropped"])
def test_a_spike_or_a_dropped_step_changes_nothing(layout, data, opened, form, what):
    engine, other = opened(form, data), opened(form, data)
    first, second, third = steps_of(data, 3)
    options = {"lr": 1e-3, "divisor": "global"}
    for one in (engine, other):
        train_step(one, first, layout, **options)
    before = everything(engine)
    if what == "spike":
        # Twice: what the engine says is the norm itself, and just above it is no limit.
        norm = train_step(engine, second, layout, limits=Limits(norm=1e-3), **options).grad_norm
        result = train_step(engine, second, layout, limits=Limits(norm=norm * (1 - 1e-6)), **options)
        assert not result.applied
        assert result.grad_norm == norm
    else:
        assert len(second) > 1
        with pytest.raises(StepDroppedError):
            train_step(engine, second, layout, between=lambda: True, **options)
    assert all_equal(everything(engine), before)
    limits = Limits(norm=norm * (1 + 1e-6)) if what == "spike" else Limits()
    rest = [second, third] if what == "spike" else [third]
    for number, packs in enumerate(rest):
        found = train_step(engine, packs, layout, limits=Limits() if number else limits, **options)
        expected = train_step(other, packs, layout, **options)
        assert found.applied
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert all_equal(everything(engine), everything(other))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("form", ["2/fp32", "3/fp32", "3/bf16/offload"])
@pytest.mark.parametrize("train", [("projector",), ("language",)])
def test_frozen_parts_stay_bit_identical(layout, data, opened, form, train):
    engine = opened(form, data, train)
    before = everything(engine)
    for packs in steps_of(data, 2, ("pictures",)):
        assert train_step(engine, packs, layout, lr=0.1, divisor="pack").grad_norm > 0
    for name, tensor in everything(engine).items():
        if not name.startswith("optimizer."):
            part = {"vision_model": "vision", "language_model": "language"}.get(name.split(".")[0], "projector")
            assert torch.equal(tensor, before[name]) == (part not in train), name
    # Packs without images have nothing for a projector to learn from.
    for packs in steps_of(data, 1, ("text",)):
        norm = train_step(engine, packs, layout, lr=1e-3, divisor="pack").grad_norm
        assert (norm == 0) == (train == ("projector",))


@needs_deepspeed
@pytest.mark.slow
def test_looking_at_the_whole_model_leaves_training_as_it_was(layout, data, opened):
    engine, other = opened("3/fp32", data), opened("3/fp32", data)
    first, second, third = steps_of(data, 3)
    for packs in (first, second):
        for one in (engine, other):
            train_step(one, packs, layout, lr=1e-3, divisor="global")
        with engine.whole_model() as model, torch.no_grad():
            assert model.logits(PackBatch.from_pack(third[0], layout)).isfinite().all()
    results = [train_step(one, third, layout, lr=1e-3, divisor="global") for one in (engine, other)]
    assert results[0].loss == results[1].loss
    assert all_equal(everything(engine), everything(other))


@needs_deepspeed
@pytest.mark.slow
def test_gradients_add_up_where_the_weights_are(layout, data, opened):
    """Bit by bit what they are in host memory, in buffers of the engine's own."""
    found, expected = (opened(form, data) for form in ("3/bf16/optimizer", "3/bf16/offload"))
    for packs in steps_of(data, 2):
        assert len(packs) > 1
        results = [train_step(one, packs, layout, lr=1e-3, divisor="global") for one in (found, expected)]
        assert (results[0].loss, results[0].grad_norm) == (results[1].loss, results[1].grad_norm)
    assert all_equal(everything(found), everything(expected))
    sums = found.zero.grad_partitions_flat_buffer
    places = found.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()
    assert {place.untyped_storage().data_ptr() for place in places} == {sums.untyped_storage().data_ptr()}
    assert sum(place.numel() for place in places) == sums.numel()
    assert sums.any()


def test_a_missing_package_says_what_to_install(monkeypatch, layout):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"nemovl\[deepspeed\]"):
        deepspeed_engine._import_deepspeed(layout.device)
