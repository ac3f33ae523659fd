"""The scan in two phases, with the exchange of states between pieces of a pack in the middle, and what goes with it.

A piece is scanned from a zero state first, which yields its `summary`; once the state before the piece is known, its
`outputs` follow. Backward likewise: the gradient of the state before the piece, if nothing came from after it, then,
with the gradient that did come, everything else. This file holds the phases for any device, on top of `reference`;
`cuda` has the same names on top of mamba-ssm's and causal-conv1d's kernels.

Shape legend: S tokens of the piece, D channels of the convolution, W taps, G groups, H heads, P head width, N state
width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemovl_train.model.kernels import reference


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """What a scan reads.

    Attributes:
        x: [S, H, P].
        dt: [S, H], before bias and softplus.
        a: [H] float32, negative.
        b: [S, G, N].
        c: [S, G, N].
        d: [H] float32.
        dt_bias: [H] float32.
        ids: [1, S] int32; document 0 is the one that the state before the piece belongs to.
        chunk_size: Tokens that are treated at once.
    """

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    dt_bias: Tensor
    ids: Tensor
    chunk_size: int

    def differentiable(self) -> tuple[Tensor, ...]:
        """The tensors that have gradients."""
        return self.x, self.dt, self.a, self.b, self.c, self.d, self.dt_bias


@dataclass(frozen=True, eq=False)
class TokenGradients:
    """Where the gradients of x, dt, b and c of `ScanInputs` are written: same shapes, as a whole, views of buffers."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor


class ForwardScan:
    """Forward over one piece."""

    def __init__(self, inputs: ScanInputs) -> None:
        self._inputs = inputs

    def summary(self) -> tuple[Tensor, Tensor]:
        """What the piece does to a state that enters it: `left * state + added` leaves it.

        Returns:
            `added` [H, P, N] float32, and `left` [H] float32, zero where a document starts in the piece.
        """
        i = self._inputs
        _, added = _scan(i, i.differentiable(), None)
        step = F.softplus(i.dt.to(added.dtype) + i.dt_bias)
        left = (step.sum(0) * i.a).exp() * (i.ids[0, -1] == 0)
        return added, left

    def independent(self) -> None:
        """Runs what does not depend on the state before the piece; on a GPU the exchange goes on meanwhile."""

    def outputs(self, entering: Tensor) -> Tensor:
        """[S, H, P], given the state before the piece [H, P, N]. Asked once."""
        y, _ = _scan(self._inputs, self._inputs.differentiable(), entering)
        return y


class BackwardScan:
    """Backward over one piece.

    Args:
        inputs: As in forward.
        entering: [H, P, N], the state before the piece.
        grad: [S, H, P], gradient of the outputs.
    """

    def __init__(self, inputs: ScanInputs, entering: Tensor, grad: Tensor) -> None:
        self._grad = grad
        self._leaves = [t.detach().requires_grad_() for t in (*inputs.differentiable(), entering)]
        with torch.enable_grad():
            *tensors, first = self._leaves
            self._y, self._last = _scan(inputs, tensors, first)

    def entering(self) -> Tensor:
        """Gradient of the state before the piece [H, P, N] float32, if nothing comes from after the piece."""
        return torch.autograd.grad(self._y, self._leaves[-1], self._grad, retain_graph=True)[0]

    def independent(self) -> None:
        """As in `ForwardScan`."""

    def gradients(self, leaving: Tensor, into: TokenGradients) -> tuple[Tensor, Tensor, Tensor]:
        """Everything else, given the gradient of the state after the piece [H, P, N]. Asked once.

        Returns:
            Gradients of a, d and dt_bias, [H] float32; the others are written where `into` says.
        """
        outputs, grads = (self._y, self._last), (self._grad, leaving)
        x, dt, a, b, c, d, dt_bias = torch.autograd.grad(outputs, self._leaves[:-1], grads)
        for place, grad in ((into.x, x), (into.dt, dt), (into.b, b), (into.c, c)):
            place.copy_(grad)
        return a, d, dt_bias


def _scan(
    inputs: ScanInputs, tensors: tuple[Tensor, ...] | list[Tensor], first: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, dt, a, b, c, d, dt_bias = tensors
    return reference.chunk_scan(
        x, dt, a, b, c, d=d, dt_bias=dt_bias, seq_idx=inputs.ids, chunk_size=inputs.chunk_size, initial_state=first
    )


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, halo: Callable[[], Tensor], halo_ids: Tensor
) -> Tensor:
    """Convolution and SiLU of a piece whose first tokens see the tokens before it.

    Args:
        x: [S, D].
        weight: [D, W].
        bias: [D].
        ids: [1, S] int32.
        halo: Gives [W - 1, D], the tokens before; [0, D] where there are none. Asked as late as possible: they may be
            on their way.
        halo_ids: [W - 1] int32, or [0].

    Returns:
        [S, D].
    """
    before = halo()
    return reference.causal_conv(torch.cat([before, x]), weight, bias, _joined(halo_ids, ids))[len(before) :]


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, halo: Tensor, halo_ids: Tensor, *, into: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and halo, given that of the output [S, D], which may be written over.

    The gradient of x is written to `into` [S, D].
    """
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, halo)]
    with torch.enable_grad():
        x_leaf, weight_leaf, bias_leaf, halo_leaf = leaves
        out = conv_forward(x_leaf, weight_leaf, bias_leaf, ids, lambda: halo_leaf, halo_ids)
    grad_x, grad_weight, grad_bias, grad_halo = torch.autograd.grad(out, leaves, grad)
    into.copy_(grad_x)
    return grad_weight, grad_bias, grad_halo


def _joined(halo_ids: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([halo_ids, ids[0]])[None]


def gated_norm_forward(y: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float, *, into: Tensor) -> Tensor:
    """`reference.gated_rms_norm`, written to `into` [S, D].

    Returns:
        What the backward pass wants to keep: nothing, here.
    """
    into.copy_(reference.gated_rms_norm(y, gate, weight, group_size=group_size, eps=eps))
    return y.new_empty(0)


def gated_norm_backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, kept: Tensor, group_size: int, eps: float, *, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and weight of the gated norm, given that of its output; that of the gate goes to `into` [S, D]."""
    leaves = [t.detach().requires_grad_() for t in (y, gate, weight)]
    with torch.enable_grad():
        out = reference.gated_rms_norm(*leaves, group_size=group_size, eps=eps)
    grad_y, grad_gate, grad_weight = torch.autograd.grad(out, leaves, grad)
    into.copy_(grad_gate)
    return grad_y, grad_weight
