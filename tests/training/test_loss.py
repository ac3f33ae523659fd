"""Loss modes and divisors against a float64 reference on samples alone, and what must not change the gradient."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import MODEL, run_config

from data_pipelines.config import LossWeightConfig
from data_pipelines.loader import heldout_packs
from nemovl_train.config.schema import OptimConfig
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import build_model
from nemovl_train.training.micro_batches import forward_backward
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.step import loss_scales, train_step

SAMPLES = 5


@pytest.fixture(scope="module")
def training(layout):
    model = build_model(MODEL, layout, params_dtype=torch.float32, backend="torch", seed=5)
    optimizers = Optimizers(model, layout, OptimConfig(), torch.float32)
    return model, optimizers


def packs_of(data, packing="none", seq_length=160, **loss):
    config = run_config(data, data).data
    config = replace(config, packing=packing, seq_length=seq_length, loss=LossWeightConfig(**loss))
    return list(heldout_packs(config, tokens_per_tile=4, split="train", max_samples=SAMPLES))


def without_supervision(pack):
    nothing = torch.full_like(pack.labels, -100)
    return replace(pack, labels=nothing, loss_weight=torch.zeros_like(pack.loss_weight))


@torch.no_grad()
def nats_and_weights(model, pack, mode, unit):
    """Sums over one sample that is alone in its pack: weighted cross entropy and weights, in float64."""
    logits = model.logits(PackBatch.from_pack(pack, model.layout)).double()
    supervised = pack.labels >= 0
    nats = torch.zeros(len(supervised), dtype=torch.float64)
    nats[supervised] = torch.nn.functional.cross_entropy(logits[supervised], pack.labels[supervised], reduction="none")
    turn = (supervised & ~supervised.roll(1)).cumsum(0)  # a pack starts unsupervised
    groups = turn.unique().tolist()[1:] if unit == "turn" else [None]
    total = weights = 0.0
    for group in groups:
        mask = supervised if group is None else supervised & (turn == group)
        n = int(mask.sum())
        weight = {"token": 1.0, "sample": 1.0 / n, "square": 1.0 / math.sqrt(n)}[mode]
        total, weights = total + weight * float(nats[mask].sum()), weights + weight * n
    return total, weights


def gradients(model, optimizers, packs, layout, divisor):
    optimizers.zero_grad()
    scales = loss_scales(packs, divisor, layout)
    loss = forward_backward(model, packs, scales, layout)
    return float(loss), {name: p.main_grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-4, (name, float(error))


@pytest.mark.parametrize("divisor", ["global", "pack"])
@pytest.mark.parametrize(
    ("mode", "unit"), [("token", "sample"), ("sample", "sample"), ("square", "sample"), ("square", "turn")]
)
def test_the_loss_of_a_step_equals_the_reference(training, layout, data, mode, unit, divisor):
    model, optimizers = training
    alone = {p.sample_keys[0]: nats_and_weights(model, p, mode, unit) for p in packs_of(data)}
    packs = packs_of(data, "sequential", 320, mode=mode, unit=unit)
    assert 1 < len(packs) < len(alone)
    sums = [[sum(alone[key][i] for key in pack.sample_keys) for i in range(2)] for pack in packs]
    if divisor == "global":
        expected = sum(nats for nats, _ in sums) / sum(weight for _, weight in sums)
    else:
        expected = sum(nats / weight for nats, weight in sums) / len(sums)
    result = train_step(optimizers, packs, layout, lr=0.0, divisor=divisor)
    assert result.loss == pytest.approx(expected, rel=2e-5)
    assert result.samples == 2 * SAMPLES
    assert result.supervised == sum(int((pack.labels >= 0).sum()) for pack in packs)


def test_the_gradient_does_not_depend_on_packing_or_order(training, layout, data):
    model, optimizers = training
    weights = {"mode": "square", "unit": "turn"}
    expected = gradients(model, optimizers, packs_of(data, "none", **weights), layout, "global")
    for packing, seq_length in (("sequential", 320), ("bfd", 640), ("sequential", 2048)):
        packs = packs_of(data, packing, seq_length, **weights)
        assert_same(gradients(model, optimizers, packs, layout, "global"), expected)
    shuffled = packs_of(data, "sequential", 320, **weights)[::-1]
    assert_same(gradients(model, optimizers, shuffled, layout, "global"), expected)


@pytest.mark.parametrize("divisor", ["global", "pack"])
def test_a_pack_without_supervision_changes_nothing(training, layout, data, divisor):
    model, optimizers = training
    packs = packs_of(data, "sequential", 320)
    expected = gradients(model, optimizers, packs, layout, divisor)
    more = [without_supervision(packs[0]), *packs]
    assert_same(gradients(model, optimizers, more, layout, divisor), expected)


@pytest.mark.parametrize("divisor", ["global", "pack"])
def test_a_step_without_any_supervision_is_a_step_of_zero_loss(training, layout, data, divisor):
    _, optimizers = training
    result = train_step(optimizers, [without_supervision(packs_of(data)[0])], layout, lr=0.0, divisor=divisor)
    assert (result.loss, result.grad_norm, result.applied) == (0.0, 0.0, True)
