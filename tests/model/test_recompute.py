"""Recomputing changes what is kept, not what comes out: losses and gradients against a model that keeps everything."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_vlm import CONFIG

from nemovl_train.config.schema import ParallelConfig, RecomputeConfig
from nemovl_train.model import offload
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

from gpu_packs import random_pack

PARTS = ("vision", "projector", "language")


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.fixture(scope="module")
def pack():
    return random_pack(CONFIG, lengths=(70, 33, 130), tiles=(2, 0, 4), seq_length=256)


def outcome(layout, pack, *, train=PARTS, config=CONFIG, **recompute):
    """Loss of every token, gradients by name, and bytes of distinct memory that autograd holds after forward."""
    model = build_model(
        config, layout, params_dtype=torch.float32, backend="torch", recompute=RecomputeConfig(**recompute)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 3.0)
    model.freeze(train)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.UntypedStorage] = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(PackBatch.from_pack(pack, layout))
    # Counted now, when what was given back is empty.
    held = sum({s._cdata: s.nbytes() for s in kept}.values())
    (loss * torch.linspace(0.5, 1.5, len(loss))).sum().backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, held


@pytest.fixture(scope="module")
def everything_kept(layout, pack):
    return outcome(layout, pack)


@pytest.mark.parametrize(
    "recompute",
    [
        {"language": "selective"},
        {"language": "full"},
        {"language": "full", "language_layers": 2},
        {"vision": "selective"},
        {"vision": "full"},
        {"vision": "tiles"},
        {"language": "offload"},
        {"language": "offload", "language_layers": 2},
        {"vision": "offload"},
        {"language": "selective", "vision": "tiles"},
    ],
    ids=str,
)
def test_the_same_comes_out_and_less_is_kept(recompute, layout, pack, everything_kept, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 2)
    loss, grads, held = outcome(layout, pack, **recompute)
    expected_loss, expected, everything = everything_kept
    assert held < everything
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # Another kernel's form of the scan, and sums over fewer tiles at a time, round otherwise.
        if recompute.get("language") == "selective" or recompute.get("vision") == "tiles":
            assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7, name
        else:
            assert torch.equal(grad, expected[name]), name


def test_more_is_dropped_from_policy_to_policy(layout, pack, everything_kept):
    held = [outcome(layout, pack, language=name)[2] for name in ("selective", "full")]
    assert held[1] < held[0] < everything_kept[2]


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
@pytest.mark.parametrize("train", [("language",), ("projector",)], ids=lambda t: t[0])
def test_with_frozen_parts(policy, train, layout, pack, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 2)
    expected_loss, expected, _ = outcome(layout, pack, train=train)
    loss, grads, _ = outcome(layout, pack, train=train, language=policy, vision=policy)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    assert all((grads[n] - expected[n]).norm() <= 1e-5 * expected[n].norm() + 1e-7 for n in grads)


def test_inputs_go_to_the_host_and_come_back_before_they_are_asked_for(layout, pack, everything_kept, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 2)
    sent, ready = [], []
    begin, get = offload.Offloaded.__init__, offload.Offloaded.get

    def noted(self, *args):
        begin(self, *args)
        sent.append(id(self))

    def asked(self):
        ready.append((id(self), self._fetched is not None))
        return get(self)

    monkeypatch.setattr(offload.Offloaded, "__init__", noted)
    monkeypatch.setattr(offload.Offloaded, "get", asked)
    _, grads, _ = outcome(layout, pack, language="offload")
    layers = CONFIG.language.num_layers
    assert len(sent) == layers, "one tensor a layer: its input"
    assert [handle for handle, _ in ready] == sent[::-1]
    assert [there for _, there in ready] == [False] + [True] * (layers - 1), "only the last input is waited for"
    assert all(torch.equal(grads[name], everything_kept[1][name]) for name in grads)


def test_what_is_fetched_is_what_backward_reads(layout, pack, everything_kept, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(offload, "SMALLEST", 2)
    get = offload.Offloaded.get
    monkeypatch.setattr(offload.Offloaded, "get", lambda self: torch.zeros_like(get(self)))
    _, grads, _ = outcome(layout, pack, language="offload")
    name = "language_model.decoder.layers.1.mlp.linear_fc2.weight"
    assert (grads[name] - everything_kept[1][name]).norm() > 0.1 * everything_kept[1][name].norm()


def test_a_wrong_remake_is_seen(layout, pack, everything_kept, monkeypatch):
    """Negative control: what is filled again is really what backward reads."""
    from nemovl_train.model import recompute

    marked = recompute.can_be_remade
    monkeypatch.setattr(recompute, "can_be_remade", lambda output, remake: marked(output, lambda into: into.zero_()))
    _, grads, _ = outcome(layout, pack, language="selective")
    name = "language_model.decoder.layers.1.mlp.linear_fc2.weight"
    assert (grads[name] - everything_kept[1][name]).norm() > 0.1 * everything_kept[1][name].norm()


def test_other_activations(layout, pack):
    """SwiGLU keeps its gate and product; only norms are made again."""
    swiglu = replace(CONFIG, language=replace(CONFIG.language, activation="swiglu"))
    expected_loss, expected, everything = outcome(layout, pack, config=swiglu)
    loss, grads, held = outcome(layout, pack, config=swiglu, language="selective")
    assert held < everything
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert all((grads[n] - expected[n]).norm() <= 1e-5 * expected[n].norm() + 1e-7 for n in grads)
