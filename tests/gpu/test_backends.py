"""Backend `te` against backend `torch` on one GPU: same keys, same weights, same answers.

Transformer Engine has no packed attention in fp32, so the comparison is against the `torch` backend in fp32 on the
same bf16-rounded weights, and the bound is what the `torch` backend itself loses by running in bf16: `te` may err at
most 1.5 times as much.

Widths are the released 12B model's; depth is one layer of each kind, and two tower blocks.
"""

from dataclasses import replace

import pytest
import torch
from gpu_packs import random_pack, relative

from nemovl_train.config.schema import LanguageConfig, ModelConfig, ParallelConfig, VisionConfig
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL, build_model
from nemovl_train.parallel.layout import Layout

pytestmark = pytest.mark.gpu

WIDE = ModelConfig(
    name="one_layer_of_each_kind",
    language=LanguageConfig(hybrid_pattern="M-M*-"),
    vision=VisionConfig(num_layers=2),
)
SLACK = 1.5


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


def outcome(model: NemotronVL, batch: PackBatch) -> dict[str, torch.Tensor]:
    """Losses and gradients, on the host."""
    losses = model(batch)
    (losses * batch.loss_weight).sum().backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"losses": losses.detach().float().cpu(), **gradients}


def build(config, layout, dtype, backend, weights=None) -> NemotronVL:
    model = build_model(config, layout, params_dtype=dtype, backend=backend)
    if weights is not None:
        parameters = dict(model.named_parameters())
        assert parameters.keys() == weights.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
    return model


@pytest.fixture(scope="module")
def outcomes(layout):
    pack = random_pack(WIDE, lengths=(700, 33, 1300, 5), tiles=(2, 0, 4, 0), seq_length=2304)
    batch = PackBatch.from_pack(pack, layout)
    te = build(WIDE, layout, torch.bfloat16, "te")
    weights = {name: parameter.detach().clone() for name, parameter in te.named_parameters()}
    results = {"te": outcome(te, batch)}
    del te
    for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        model = build(WIDE, layout, dtype, "torch", weights)
        results[name] = outcome(model, batch)
        del model
        torch.cuda.empty_cache()
    return results


def test_backends_have_the_same_keys_and_agree(outcomes, record):
    """The names were compared above; here the numbers."""
    exact = outcomes["torch fp32"]
    assert outcomes["te"].keys() == exact.keys()
    worst = 0.0
    for name, expected in exact.items():
        if name.endswith("linear_qkv.bias"):
            continue  # its key third is zero up to rounding, which says nothing
        te, plain = relative(outcomes["te"][name], expected), relative(outcomes["torch bf16"][name], expected)
        worst = max(worst, te / max(plain, 1e-3))
        assert te <= SLACK * max(plain, 1e-3), f"{name}: te {te:.2e}, torch in bf16 {plain:.2e}"
    record("te error over torch's own bf16 error, worst of losses and gradients", worst, SLACK)
    record("te losses against torch fp32", relative(outcomes["te"]["losses"], exact["losses"]), 1e-2)


def test_packed_equals_alone_under_te(layout, record):
    """Each document alone gives the losses that it has inside the pack, up to bf16 rounding of other kernel tiles."""
    config = replace(WIDE, parts=("language",))
    model = build(config, layout, torch.bfloat16, "te")
    lengths = (700, 33, 1300, 5)
    pack = random_pack(config, lengths=lengths, tiles=(0, 0, 0, 0), seq_length=sum(lengths))
    with torch.no_grad():
        together = model(PackBatch.from_pack(pack, layout)).split(lengths)
        for number, length in enumerate(lengths):
            alone = random_pack(config, lengths=lengths, tiles=(0, 0, 0, 0), seq_length=length, only=number)
            losses = model(PackBatch.from_pack(alone, layout))
            error = relative(together[number], losses)
            record(f"packed = alone, te bf16, document of {length}", error, 3e-3)
            assert error <= 3e-3
