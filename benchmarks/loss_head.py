"""Output layer and cross entropy alone: memory beyond inputs and weight, time, error.

`fused` is what training does, gradients made in forward; `remade` makes logits again in backward, for callers that do
not know the losses' weights beforehand; `eager` is the plain form, and `stock` megatron-core's best: all logits, then
Transformer Engine's cross entropy, which makes their gradient of a copy (CUDA only).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = 5120
SHARE = 0.3
"""Of the positions that are supervised, in the second measurement."""


def measure_head(case: Any) -> dict[str, Any]:
    """Forward and backward over a pack, medians; `extra` is memory that exists beside inputs, weight and gradients."""
    from nemovl_train.config.schema import ParallelConfig
    from nemovl_train.parallel.layout import Layout

    layout = Layout.create(ParallelConfig())
    try:
        return _measure(case, layout)
    finally:
        layout.destroy()


def _measure(case: Any, layout: Any) -> dict[str, Any]:
    from nemovl_train.model.loss import IGNORE, token_loss

    cuda = layout.device.type == "cuda"
    dtype, device = (torch.bfloat16 if cuda else torch.float32), layout.device
    generator = torch.Generator(device).manual_seed(0)
    width = HIDDEN if cuda else 64

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    hidden = normal(case.seq_length, 1, width, std=1.0).requires_grad_()
    weight = torch.nn.Parameter(normal(case.vocab_size, width, std=0.02))
    labels = torch.randint(0, case.vocab_size, (case.seq_length,), generator=generator, device=device)
    head = SimpleNamespace(sequence_parallel=False, tp_group=layout.language_groups.tp, weight=weight)
    weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=device)

    def ours(positions: Tensor, *, known: bool) -> Tensor:
        weight.main_grad.zero_()
        chosen = torch.full_like(labels, IGNORE).index_copy(0, positions, labels[positions])
        share = torch.full(labels.shape, 1 / len(positions), device=device)
        losses = token_loss(hidden, head, chosen, positions, gradient=share if known else None)
        return (losses * share).sum()

    fused, remade = partial(ours, known=True), partial(ours, known=False)

    def eager(positions: Tensor) -> Tensor:
        logits = F.linear(hidden.squeeze(1).index_select(0, positions), weight).float()
        return F.cross_entropy(logits, labels[positions])

    def stock(positions: Tensor) -> Tensor:
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

        logits = F.linear(hidden.index_select(0, positions), weight)
        return te_parallel_cross_entropy(logits, labels[positions][:, None], head.tp_group).mean()

    every = torch.arange(case.seq_length, device=device)
    some = every[:: round(1 / SHARE)]
    rounds = case.steps if cuda else 2
    rows = {
        "fused": _measured(fused, every, hidden, weight, cuda, rounds),
        "fused_supervised": _measured(fused, some, hidden, weight, cuda, rounds),
        "remade": _measured(remade, every, hidden, weight, cuda, rounds),
        "eager": _measured(eager, every, hidden, weight, cuda, rounds),
    }
    if cuda:
        rows["stock"] = _measured(stock, every, hidden, weight, cuda, rounds)
    row = {f"{name}_{key}": value for name, found in rows.items() for key, value in found.items()}
    row |= _errors(fused, eager, every[: min(2048, len(every))], hidden, weight)
    return row


def _measured(
    loss: Callable[[Tensor], Tensor], positions: Tensor, hidden: Tensor, weight: Any, cuda: bool, rounds: int
) -> dict[str, float]:
    seconds = []
    for number in range(rounds + 2):
        hidden.grad = weight.grad = None
        weight.grad_added_to_main_grad = False
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        loss(positions).backward()
        if cuda:
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - began)
    found = {"milliseconds": statistics.median(seconds) * 1e3}
    if cuda:
        # Ours adds the weight's gradient to `main_grad`, which was there before.
        gradients = hidden.grad.nbytes + (0 if weight.grad_added_to_main_grad else weight.grad.nbytes)
        found["extra_gib"] = (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
    return found


def _errors(
    fused: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], positions: Tensor, hidden: Tensor, weight: Any
) -> dict[str, float]:
    """Of the loss and both gradients, relative in norm, to the plain form with the same bf16 logits."""
    losses, of_hidden, of_weight = [], [], []
    for form in (fused, eager):
        hidden.grad = weight.grad = None
        loss = form(positions)
        loss.backward()
        losses.append(float(loss.detach()))
        of_hidden.append(hidden.grad.float())
        of_weight.append(weight.main_grad if form is fused else weight.grad.float())
    return {
        "loss": losses[0],
        "loss_error": abs(losses[0] - losses[1]) / losses[1],
        "hidden_gradient_error": float((of_hidden[0] - of_hidden[1]).norm() / of_hidden[1].norm()),
        "weight_gradient_error": float((of_weight[0] - of_weight[1]).norm() / of_weight[1].norm()),
    }
