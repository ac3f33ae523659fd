"""The output layer and its loss at the 12B's width, against the plain form in float32 from the same bf16 values."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpu_packs import relative

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.model.loss import IGNORE, token_loss
from nemovl_train.parallel.layout import Layout

pytestmark = pytest.mark.gpu

WIDTH, ROWS, TOKENS = 5120, 131072, 4096


@pytest.fixture(scope="module")
def group():
    layout = Layout.create(ParallelConfig())
    yield layout.language_groups.tp
    layout.destroy()


def inputs():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(TOKENS, 1, WIDTH, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = torch.nn.Parameter((torch.randn(ROWS, WIDTH, generator=generator, device="cuda") * 0.02).bfloat16())
    labels = torch.randint(0, ROWS, (TOKENS,), generator=generator, device="cuda")
    labels[torch.rand(TOKENS, generator=generator, device="cuda") < 0.3] = IGNORE
    loss_weight = torch.rand(TOKENS, generator=generator, device="cuda") * (labels >= 0)
    return hidden, weight, labels, loss_weight / loss_weight.sum()


@pytest.mark.parametrize("known", [False, True], ids=["gradient in backward", "gradient in forward"])
def test_loss_gradients_and_memory(known, group, record):
    hidden, weight, labels, loss_weight = inputs()
    weight.main_grad = torch.zeros(ROWS, WIDTH, device="cuda")
    head = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)
    positions = (labels >= 0).nonzero()[:, 0]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = token_loss(hidden, head, labels, positions, gradient=loss_weight if known else None)
    (losses * loss_weight).sum().backward()
    extra = (torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes) / 2**30
    record(f"loss head, memory in GiB, known={known}", extra, 0.5)
    assert extra < 0.5

    wide = hidden.detach().squeeze(1).float().requires_grad_()
    rows = weight.detach().float().requires_grad_()
    expected = F.cross_entropy(wide @ rows.t(), labels, reduction="none", ignore_index=IGNORE)
    (expected * loss_weight).sum().backward()
    pairs = {
        "loss": (losses, expected),
        "hidden": (hidden.grad[:, 0], wide.grad),
        "weight": (weight.main_grad, rows.grad),
    }
    for name, (found, wanted) in pairs.items():
        error = relative(found, wanted)
        record(f"loss head, {name}, known={known}", error, 1e-2)
        assert error <= 1e-2, name
