"""Output layer and cross entropy in one, against the plain form in float64."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipelines.config import LOSS_MODES
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.model import loss as module
from nemovl_train.model.chunks import rows_at_a_time
from nemovl_train.model.loss import IGNORE, token_loss
from nemovl_train.parallel.layout import Layout

TOKENS, WIDTH, ROWS = 37, 24, 53


@pytest.fixture(scope="module")
def group():
    layout = Layout.create(ParallelConfig())
    yield layout.language_groups.tp
    layout.destroy()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Many blocks of columns a chunk, the last of them short."""
    monkeypatch.setattr(module, "FLOAT_LOGITS", 60)


def inputs(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, 1, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator).to(dtype))
    labels = torch.randint(0, ROWS, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < 0.4] = IGNORE
    return hidden, weight, labels


def head(weight, group):
    return SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)


def plain(hidden, weight, labels, loss_weight):
    """Loss and gradients in float64 from the same values."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    losses = F.cross_entropy(h.squeeze(1) @ w.t(), labels, reduction="none", ignore_index=IGNORE)
    return losses.detach(), torch.autograd.grad((losses * loss_weight).sum(), (h, w))


def weights_of(mode, labels):
    """Loss weights of three samples, as the data side makes them: whole samples, then slices."""
    edges, weight = (0, 5, 22, TOKENS), torch.zeros(TOKENS, dtype=torch.float64)
    for begin, end in pairwise(edges):
        counted = labels[begin:end] != IGNORE
        n = max(int(counted.sum()), 1)
        weight[begin:end][counted] = {"token": 1.0, "sample": 1 / n, "square": 1 / np.sqrt(n)}[mode]
    return weight / weight.sum()


BOTH = pytest.mark.parametrize("known", [False, True], ids=["gradient in backward", "gradient in forward"])


@BOTH
@pytest.mark.parametrize("mode", LOSS_MODES)
@pytest.mark.parametrize("chunk", [5, TOKENS])
def test_loss_and_gradients_in_every_mode(mode, chunk, known, group):
    hidden, weight, labels = inputs()
    loss_weight = weights_of(mode, labels)
    expected, (of_hidden, of_weight) = plain(hidden, weight, labels, loss_weight)
    gradient = loss_weight.float() if known else None
    losses = token_loss(hidden, head(weight, group), labels, chunk=chunk, gradient=gradient)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    (losses * loss_weight.float()).sum().backward()
    assert (hidden.grad - of_hidden).norm() <= 1e-6 * of_hidden.norm()
    assert (weight.grad - of_weight).norm() <= 1e-6 * of_weight.norm()


@BOTH
@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
def test_bf16_weight_gradients_go_to_the_optimizers_buffer(buffer, known, group):
    """They are added to what is there, in the buffer's precision; what autograd gets is no memory of its own."""
    hidden, weight, labels = inputs(torch.bfloat16)
    loss_weight = weights_of("token", labels)
    _, (of_hidden, of_weight) = plain(hidden, weight, labels, loss_weight)
    weight.main_grad = torch.full(weight.shape, 0.5, dtype=buffer)
    weight.grad_added_to_main_grad = False
    gradient = loss_weight.float() if known else None
    losses = token_loss(hidden, head(weight, group), labels, chunk=5, gradient=gradient)
    weight.main_grad[:, 0] += 1  # between forward and backward other parts of the buffer may change
    weight.main_grad[:, 0] -= 1
    (losses * loss_weight.float()).sum().backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.dtype == weight.dtype
    assert weight.grad.shape == weight.shape
    tolerance = 0.01 if buffer == torch.float32 else 0.1
    assert (weight.main_grad - 0.5 - of_weight).norm() <= tolerance * of_weight.norm()
    assert (hidden.grad - of_hidden).norm() <= 0.02 * of_hidden.norm()


@BOTH
def test_a_frozen_head_has_no_gradient_and_passes_it_on(known, group):
    hidden, weight, labels = inputs()
    loss_weight = weights_of("token", labels)
    expected, (of_hidden, _) = plain(hidden, weight, labels, loss_weight)
    weight.requires_grad_(False)
    losses = token_loss(hidden, head(weight, group), labels, gradient=loss_weight.float() if known else None)
    (losses * loss_weight.float()).sum().backward()
    assert weight.grad is None
    assert (hidden.grad - of_hidden).norm() <= 1e-6 * of_hidden.norm()
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_known_gradients_give_the_same_bits_from_three_products(group, monkeypatch):
    """Two of them in forward without logits kept, against four."""
    found, products = [], []
    monkeypatch.setattr(
        module.F, "linear", lambda *operands: products.append(1) or torch.matmul(operands[0], operands[1].t())
    )
    for known in (False, True):
        hidden, weight, labels = inputs(torch.bfloat16)
        loss_weight = weights_of("square", labels).float()
        before = len(products)
        losses = token_loss(hidden, head(weight, group), labels, chunk=5, gradient=loss_weight if known else None)
        (losses * loss_weight).sum().backward()
        found.append((losses.detach(), hidden.grad, weight.grad, len(products) - before))
    for backward, forward in zip(*(numbers[:3] for numbers in found), strict=True):
        assert torch.equal(backward, forward)
    assert found[0][3] == 2 * found[1][3]


def test_other_gradients_than_were_known_are_refused(group):
    hidden, weight, labels = inputs()
    loss_weight = weights_of("token", labels).float()
    losses = token_loss(hidden, head(weight, group), labels, gradient=loss_weight)
    with pytest.raises(RuntimeError, match="other weights than"):
        (losses * loss_weight * 2).sum().backward()


def test_without_gradients_nothing_is_made_in_forward(group):
    hidden, weight, labels = inputs()
    weight.main_grad = torch.zeros(weight.shape)
    with torch.no_grad():
        token_loss(hidden, head(weight, group), labels, gradient=weights_of("token", labels).float())
    assert not weight.main_grad.any()


def test_logits_too_large_for_exp(group):
    hidden, weight, labels = inputs()
    with torch.no_grad():
        weight.mul_(100)
    losses = token_loss(hidden, head(weight, group), labels)
    expected, _ = plain(hidden, weight, labels, weights_of("token", labels))
    assert expected.max() > 100
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-3)


def test_nothing_but_rows_and_a_number_each_is_kept(group):
    """Neither logits nor softmax: rows, their targets and one float32 each."""
    hidden, weight, labels = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_loss(hidden, head(weight, group), labels)
    supervised = int((labels != IGNORE).sum())
    assert max(t.numel() for t in kept if t is not weight) <= max(supervised * WIDTH, WIDTH * ROWS)
    assert not any(t.shape == (supervised, ROWS) for t in kept)


def test_rows_at_a_time_are_whole_tiles_within_the_memory():
    assert rows_at_a_time(132096, 2) == 1536
    assert rows_at_a_time(132096 // 4, 2) == 6272
    assert rows_at_a_time(10**9, 4) == 128
