"""AdamW over both sides: weight decay, frozen parts, steps that must change nothing."""

import gc
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import MODEL, run_config

from data_pipelines.loader import PackStream
from nemovl_train.config.schema import OptimConfig, PartScales
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import build_model
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.optimizer_state import _common
from nemovl_train.training.step import train_step

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.5, eps=1e-5, clip_grad=0.7)


def make(layout, train=("vision", "projector", "language"), optim=OPTIM):
    model = build_model(MODEL, layout, params_dtype=torch.float32, backend="torch", seed=5)
    model.freeze(train=train)
    optimizers = Optimizers(model, layout, optim, torch.float32)
    return model, optimizers


def steps_of(data, count, sources=("text", "pictures")):
    config = run_config(data, data, sources=sources).data
    stream = PackStream(config, tokens_per_tile=4, seed=1, global_batch=2)
    packs = [next(stream) for _ in range(count)]
    stream.close()
    return packs


def moments(optimizers):
    """Every tensor that the optimizers hold."""
    found = []
    for side in optimizers.sides:
        for inner in getattr(side.optimizer, "chained_optimizers", [side.optimizer]):
            for group in inner.optimizer.param_groups:
                for parameter in group["params"]:
                    found.append(parameter.detach().clone())
                    state = inner.optimizer.state[parameter]
                    found += [value.clone() for value in state.values() if isinstance(value, torch.Tensor)]
    return found


def all_equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_save_asks_a_fused_adam_for_the_state_of_one_parameter_alone(fused):
    """It would answer with float32 copies of all moments. torch's AdamW counts its steps in all of them."""
    large, small = torch.zeros(9), torch.zeros(2)
    state = {large: {"exp_avg": large}, small: {"exp_avg": small}}
    inner = SimpleNamespace(state=state, **({"get_unscaled_state": None} if fused else {}))
    outer = SimpleNamespace(optimizer=inner, state_dict=lambda: list(inner.state))
    assert _common(outer) == ([small] if fused else [large, small])
    assert inner.state is state  # nothing is lost


@pytest.mark.parametrize("distributed", [True, False])
def test_three_steps_equal_torch_adamw_where_vectors_do_not_decay(layout, data, distributed):
    model, optimizers = make(layout, optim=replace(OPTIM, distributed=distributed))
    plain = build_model(MODEL, layout, params_dtype=torch.float32, backend="torch", seed=5)
    named = dict(plain.named_parameters())
    vectors = {name for name, p in named.items() if p.dim() == 1}
    kinds = {name.rpartition(".")[2] for name in vectors}
    assert {"bias", "A_log", "D", "dt_bias", "conv1d_bias", "weight"} <= kinds
    others = {name.rpartition(".")[2] for name in named.keys() - vectors}
    assert {"weight", "conv1d_weight", "position_embeddings", "class_token"} <= others
    groups = [
        {"params": [p for n, p in named.items() if n not in vectors]},
        {"params": [named[n] for n in sorted(vectors)], "weight_decay": 0.0},
    ]
    settings = {"lr": OPTIM.lr, "betas": (OPTIM.beta1, OPTIM.beta2), "eps": OPTIM.eps}
    reference = torch.optim.AdamW(groups, weight_decay=OPTIM.weight_decay, **settings)
    for packs in steps_of(data, 3):
        result = train_step(optimizers, packs, layout, lr=OPTIM.lr, divisor="global")
        reference.zero_grad()
        total = sum(float(pack.loss_weight.sum()) for pack in packs)
        for pack in packs:
            batch = PackBatch.from_pack(pack, layout)
            ((plain(batch) * batch.loss_weight).sum() / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), OPTIM.clip_grad)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert float(norm) > OPTIM.clip_grad
        reference.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("scales", [(0.5, 0.1, 3.0), (0.2, 0.2, 1.0)])
def test_each_part_has_its_own_learning_rate(layout, data, scales):
    """AdamW's step is proportional to the rate: with scales each part moves by its factor of what it moves without."""
    moves = []
    (packs,) = steps_of(data, 1, ("pictures",))
    for scale in (PartScales(), PartScales(vision=scales[0], projector=scales[1], language=scales[2])):
        model, optimizers = make(layout, optim=replace(OPTIM, lr_scale=scale))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(optimizers, packs, layout, lr=1e-2, divisor="global")
        moves.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    factors = dict(zip(("vision_model", "projector", "language_model"), scales, strict=True))
    for name, plain in moves[0].items():
        # Weights near 1 are rounded to 1.2e-7.
        torch.testing.assert_close(
            moves[1][name], plain * factors[name.partition(".")[0]], rtol=1e-3, atol=5e-7, msg=name
        )


@pytest.mark.parametrize("kept", [False, True])
def test_what_nobody_holds_is_freed_after_training(layout, data, kept):
    """What autograd holds leads to the model's config: were the optimizers held by it, nothing would be freed."""
    model, optimizers = make(layout, optim=replace(OPTIM, distributed=True))
    if kept:
        model.config.no_sync_func = optimizers.no_sync
    (packs,) = steps_of(data, 1)
    assert train_step(optimizers, packs, layout, lr=1e-3, divisor="pack").applied
    watched = [weakref.ref(side.ddp) for side in optimizers.sides]
    watched += [weakref.ref(model), weakref.ref(optimizers), weakref.ref(next(model.parameters()))]
    del model, optimizers
    gc.collect()
    assert [one() is not None for one in watched] == [kept] * 5


@pytest.mark.parametrize("train", [("projector",), ("language",), ("vision", "projector")])
def test_frozen_parts_stay_bit_identical_and_hold_no_state(layout, data, train):
    model, optimizers = make(layout, train)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for packs in steps_of(data, 2, ("pictures",)):
        assert train_step(optimizers, packs, layout, lr=1e-3, divisor="pack").applied
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trainable), name
        assert name in trainable or (p.grad is None and not hasattr(p, "main_grad")), name
    assert optimizers.num_parameters() == sum(before[name].numel() for name in trainable)
    assert len(optimizers.sides) == 1
    # Master weights and two moments; the distributed optimizer's own buffers are as long, steps are scalars.
    held = sum(tensor.numel() for tensor in moments(optimizers) if tensor.numel() > 1)
    scalars = sum(1 for name in trainable if before[name].numel() == 1)
    assert held == pytest.approx(3 * (optimizers.num_parameters() - scalars), abs=3 * len(trainable))


def test_stage_zero_meets_packs_without_images(layout, data):
    model, optimizers = make(layout, ("projector",), replace(OPTIM, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    (packs,) = steps_of(data, 1, ("text",))
    result = train_step(optimizers, packs, layout, lr=1e-3, divisor="pack")
    assert result.applied
    assert (result.grad_norm, result.tiles) == (0.0, 0)
    assert all_equal([p.detach() for p in model.parameters()], before)
    (pictures,) = steps_of(data, 1, ("pictures",))
    mixed = [packs[0], pictures[0]]
    assert train_step(optimizers, mixed, layout, lr=1e-3, divisor="pack").grad_norm > 0


def test_stages_without_images_leave_a_training_tower_without_gradient(layout, data):
    model, optimizers = make(layout, optim=replace(OPTIM, weight_decay=0.0))
    tower = [p.detach().clone() for p in model.vision_model.parameters()]
    for packs in steps_of(data, 2, ("text",)):
        assert train_step(optimizers, packs, layout, lr=1e-3, divisor="pack").applied
    assert all_equal([p.detach() for p in model.vision_model.parameters()], tower)


def test_weight_decay_of_a_tower_without_images_is_adamws(layout, data):
    """A stage that trains the tower but shows it no image decays it as AdamW says; to keep it, leave it out of
    `trainer.train`."""
    model, optimizers = make(layout, optim=replace(OPTIM, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("language_model")}
    for packs in steps_of(data, 2, ("text",)):
        assert train_step(optimizers, packs, layout, lr=1e-2, divisor="pack").applied
    parameters = dict(model.named_parameters())
    for name, tensor in before.items():
        # Vectors have no decay.
        expected = tensor * (1 - 1e-2 * 0.1) ** 2 if tensor.dim() > 1 else tensor
        torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(layout, data, where, value):
    model, optimizers = make(layout)
    first, second, third = steps_of(data, 3)
    train_step(optimizers, first, layout, lr=1e-3, divisor="global")
    weights, state = [p.detach().clone() for p in model.parameters()], moments(optimizers)
    hook = None
    if where == "loss":
        poison = torch.full_like(second[1].loss_weight, value)
        bad = [second[0], replace(second[1], loss_weight=poison)]
    else:
        bad = second
        hook = model.projector.linear_fc1.weight.register_hook(lambda gradient: gradient * value)
    result = train_step(optimizers, bad, layout, lr=1e-3, divisor="global")
    if hook is not None:
        hook.remove()
        assert math.isfinite(result.loss)
        assert not math.isfinite(result.grad_norm)
    assert not result.applied
    assert all_equal([p.detach() for p in model.parameters()], weights)
    assert all_equal(moments(optimizers), state)
    assert train_step(optimizers, third, layout, lr=1e-3, divisor="global").applied
    assert not all_equal([p.detach() for p in model.parameters()], weights)
