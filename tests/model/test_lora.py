"""Adapters against arithmetic by hand, on the built model: which layers, which sizes, which sum."""

import pytest
import tiny
import torch

from nemovl_train.config.adapters import adapted_linears, linears
from nemovl_train.config.schema import AdapterConfig, AdapterTargets
from nemovl_train.model.adapters import add_adapters, merge_adapters
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.lora import adapters
from nemovl_train.model.vlm import ATTRIBUTES, build_model
from nemovl_train.plan.trainable import trainable

EVERYWHERE = AdapterConfig(rank=3, alpha=6.0, targets=AdapterTargets(vision=("*",), projector=("*",), language=("*",)))


@pytest.fixture
def model(layout):
    return build_model(tiny.TINY, layout, params_dtype=torch.float32, backend="torch", seed=3).eval()


@pytest.fixture
def batch(layout):
    samples = [tiny.Sample.random(1, text=(5, 9), tiles=(2,)), tiny.Sample.random(2, text=(20,))]
    return PackBatch.from_pack(tiny.make_pack(samples, 64), layout)


def fill(model):
    generator = torch.Generator().manual_seed(9)
    for _, pair in adapters(model):
        pair.lora_b.data = torch.randn(pair.lora_b.shape, generator=generator) * 0.3


def test_the_table_is_the_built_model(model):
    """Every linear layer of the parts, by name and size, but embedding, head and patch embedding."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    built = {}
    for part, module in model.part_modules().items():
        for name, layer in module.named_modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                split = "outputs" if isinstance(layer, ColumnParallelLinear) else "inputs"
                built[part, name] = (*reversed(layer.weight.shape), split)
    assert built.pop(("language", "output_layer"))
    built.pop(("vision", "embedder"), None)
    assert built == {(x.part, x.name): (x.inputs, x.outputs, x.split) for x in linears(tiny.TINY)}


def test_at_first_nothing_changes(model, batch, layout):
    before = model.logits(batch)
    add_adapters(model, EVERYWHERE, layout, seed=5)
    assert torch.equal(model.logits(batch), before)
    assert len(list(adapters(model))) == len(adapted_linears(tiny.TINY, EVERYWHERE))


def test_it_is_the_published_sum(model, batch, layout):
    """W + alpha / rank * B A put in place of W in a model without adapters gives the same logits."""
    plain = model.logits(batch)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, EVERYWHERE, layout, seed=5)
    fill(model)
    with_adapters = model.logits(batch)
    assert (with_adapters - plain).abs().max() > 0.1
    by_hand = build_model(tiny.TINY, layout, params_dtype=torch.float32, backend="torch", seed=3).eval()
    with torch.no_grad():
        for name, pair in adapters(model):
            weight = f"{name.removesuffix('.adapter')}.weight"
            by_hand.get_parameter(weight).copy_(weights[weight] + 6.0 / 3 * pair.lora_b @ pair.lora_a)
    torch.testing.assert_close(
        by_hand.logits(batch), with_adapters, rtol=0, atol=1e-5 * float(plain.detach().abs().max())
    )
    merge_adapters(model)
    assert list(adapters(model)) == []
    assert torch.equal(model.logits(batch), by_hand.logits(batch))


def test_every_pair_takes_part_and_nothing_else_has_a_gradient(model, batch, layout):
    """A layer that used its weight without calling its linear would leave its pair without gradient."""
    add_adapters(model, EVERYWHERE, layout, seed=5)
    fill(model)
    model.freeze(train=())
    model.train()
    model(batch).sum().backward()
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_first_halves_depend_on_the_seed_and_the_name(layout):
    def pairs(targets, seed):
        model = build_model(tiny.TINY, layout, params_dtype=torch.float32, backend="torch")
        add_adapters(model, AdapterConfig(rank=3, targets=targets), layout, seed=seed)
        return {name: pair.lora_a.detach() for name, pair in adapters(model)}

    every = pairs(EVERYWHERE.targets, 5)
    some = pairs(AdapterTargets(language=("in_proj",)), 5)
    assert all(torch.equal(every[name], tensor) for name, tensor in some.items())
    other = pairs(AdapterTargets(language=("in_proj",)), 6)
    assert not any(torch.equal(some[name], tensor) for name, tensor in other.items())
    values = every["language_model.decoder.layers.0.mixer.in_proj.adapter"]
    assert 0.8 * 64**-0.5 < values.abs().max() <= 64**-0.5


def test_planned_counts_are_those_of_the_model(model, layout):
    from nemovl_train.config.schema import RunConfig, TrainerConfig

    add_adapters(model, EVERYWHERE, layout, seed=5)
    rows = trainable(RunConfig(model=tiny.TINY, adapter=EVERYWHERE, trainer=TrainerConfig(train=())))
    for part, attribute in ATTRIBUTES.items():
        named = dict(getattr(model, attribute).named_parameters())
        assert rows[part].adapters == sum(p.numel() for name, p in named.items() if ".adapter." in name)
        assert rows[part].own == sum(p.numel() for name, p in named.items() if ".adapter." not in name)
        assert (rows[part].trained, rows[part].held) == (rows[part].adapters, rows[part].own + rows[part].adapters)
