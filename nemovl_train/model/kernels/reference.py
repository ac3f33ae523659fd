"""Mamba-2's three kernels in plain PyTorch: differentiable, any device, state reset at every document boundary.

The scan is the chunked "state space duality" form (Mamba-2, arXiv 2405.21060, section 6): attention-like products
inside chunks, a short recurrence over chunk states between them. Arithmetic is float32 (float64 for float64 input)
whatever the storage type, as in the CUDA kernels.

Shape legend: S tokens in a pack, C chunks, Q tokens of a chunk, D channels, W taps, G groups, R heads of a group,
P head width, N state width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
    """Depthwise causal convolution and SiLU; no tap reaches into an earlier document.

    Args:
        x: [S, D].
        weight: [D, W]; the last tap meets the token itself.
        bias: [D].
        seq_idx: [1, S], number of the document of every token.

    Returns:
        [S, D], dtype of `x`.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    out = _DepthwiseConv.apply(x.to(compute), weight.to(compute), bias.to(compute), seq_idx[0])
    return F.silu(out).to(x.dtype)


class _DepthwiseConv(torch.autograd.Function):
    """Sum of shifted copies. By hand because the input is all that backward needs; autograd would keep a copy a tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, seq_idx)
        taps = weight.t().flip(0).contiguous()  # row i meets the token i places before; rows are several times faster
        out = torch.addcmul(bias, x, taps[0])
        for shift in range(1, min(len(taps), len(x))):
            out[shift:].addcmul_(x[:-shift] * _same_document(seq_idx, shift, x.dtype), taps[shift])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, seq_idx = ctx.saved_tensors
        taps = weight.t().flip(0).contiguous()
        grad_x = grad * taps[0]
        grad_taps = torch.zeros_like(taps)
        grad_taps[0] = (grad * x).sum(0)
        for shift in range(1, min(len(taps), len(x))):
            seen = grad[shift:] * _same_document(seq_idx, shift, grad.dtype)
            grad_x[:-shift].addcmul_(seen, taps[shift])
            grad_taps[shift] = seen.mul_(x[:-shift]).sum(0)
        return grad_x, grad_taps.flip(0).t(), grad.sum(0), None


def _same_document(seq_idx: Tensor, shift: int, dtype: torch.dtype) -> Tensor:
    """1 where the token `shift` places before is of the same document, else 0: [S - shift, 1]."""
    return (seq_idx[shift:] == seq_idx[:-shift]).to(dtype).unsqueeze(1)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's selective scan.

    h_t = exp(dt_t a) h_(t-1) + dt_t b_t x_t, y_t = c_t h_t + d x_t, with dt_t = softplus(dt_t + dt_bias).

    Args:
        x: [S, G * R, P].
        dt: [S, G * R], before bias and softplus.
        a: [G * R], negative.
        b: [S, G, N].
        c: [S, G, N].
        d: [G * R].
        dt_bias: [G * R].
        seq_idx: [1, S]; the state is zero at the first token of every document but a number 0 at the start.
        chunk_size: Tokens that are treated at once; it changes speed and rounding, not the result.
        initial_state: [G * R, P, N], the state before the first token; it belongs to document 0, as in the kernels.

    Returns:
        y [S, G * R, P] in the dtype of `x`, and the state after the last token [G * R, P, N] in the compute dtype.
    """
    dtype, compute = x.dtype, torch.promote_types(x.dtype, torch.float32)
    length, heads, width = x.shape
    groups, state = b.shape[1:]
    shape = (-1, chunk_size, groups, heads // groups, width)
    pad = -length % chunk_size
    ids = torch.cat([seq_idx[0], seq_idx[0, -1:].expand(pad)]).view(-1, chunk_size)
    entering = torch.cat([ids.new_zeros(1), ids[:-1, -1]])  # document that the state before each chunk belongs to

    # Padding steps are zero: they neither decay the state nor add to it.
    step = F.pad(F.softplus(dt.to(compute) + dt_bias.to(compute)), (0, 0, 0, pad)).view(shape[:-1])
    # Log decay since the start of the chunk or of the document inside it: [C, G, R, Q]. A plain running sum would go on
    # over boundaries; the differences would be right, but rounded differently for every neighbour.
    visible = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril_()
    total = visible.to(compute) @ (step * a.to(compute).view(groups, -1)).flatten(2)
    total = total.view(shape[:-1]).permute(0, 2, 3, 1).contiguous()
    x = x.to(compute)
    inputs = (F.pad(x, (0, 0, 0, 0, 0, pad)).view(shape) * step.unsqueeze(-1)).transpose(1, 2)  # [C, G, Q, R, P]
    # Groups stay a dimension of their own, so that B and C serve all heads of a group without being repeated.
    b, c = (
        F.pad(t.to(compute), (0, 0, 0, 0, 0, pad)).view(-1, chunk_size, groups, state).transpose(1, 2) for t in (b, c)
    )  # [C, G, Q, N]

    states, decay = _chunk_states(inputs, total, b, ids, entering)
    first = states.new_zeros(states.shape[1:])
    if initial_state is not None:
        first = initial_state.to(compute).view(groups, -1, width, state).permute(0, 3, 1, 2)
    before, last = _ChunkRecurrence.apply(states, decay, first)
    y = _InsideChunks.apply(inputs.transpose(2, 3).contiguous(), total, b, c, ~visible).transpose(2, 3)
    y = y + _from_before(before, total, c, ids, entering)
    y = y.transpose(1, 2).reshape(-1, heads, width)[:length]
    y = torch.addcmul(y, x, d.to(compute).unsqueeze(1))
    return y.to(dtype), last.permute(0, 2, 3, 1).reshape(heads, width, state)


class _InsideChunks(torch.autograd.Function):
    """What tokens get from earlier tokens of their own chunk and document: y_i = sum_j (c_i b_j) exp(t_i - t_j) x_j.

    By hand because this is the slow part on a CPU: its [Q, Q] tables are met half as often in backward as autograd
    would. The gradient of t_i is the sum of a pair table's row i minus that of its column i.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, total: Tensor, b: Tensor, c: Tensor, hidden: Tensor) -> Tensor:
        """Takes inputs [C,G,R,Q,P], total [C,G,R,Q], b and c [C,G,Q,N], hidden [C,Q,Q]; gives [C,G,R,Q,P]."""
        # Hidden pairs leave before exp: towards a later token the decay is positive and overflows.
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(hidden[:, None, None], -torch.inf)
        decay.exp_()
        ctx.save_for_backward(inputs, decay, b, c)
        return (_scores(b, c) * decay) @ inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, decay, b, c = ctx.saved_tensors
        scores = _scores(b, c)
        grad_inputs = (scores * decay).transpose(-1, -2) @ grad
        grad_scores = (grad @ inputs.transpose(-1, -2)).mul_(decay)
        pairs = grad_scores * scores
        # A token with itself does not decay; left in, its large product would cancel only up to rounding.
        pairs.diagonal(dim1=-2, dim2=-1).zero_()
        grad_total = pairs.sum(-1) - pairs.sum(-2)
        grad_scores = grad_scores.sum(2)
        return grad_inputs, grad_total, grad_scores.transpose(-1, -2) @ c, grad_scores @ b, None


def _scores(b: Tensor, c: Tensor) -> Tensor:
    """Products of every c_i with every b_j, one table per group: [C, G, 1, Q, Q]."""
    return (c @ b.transpose(-1, -2)).unsqueeze(2)


def _chunk_states(inputs: Tensor, total: Tensor, b: Tensor, ids: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk adds to the state [C, G, N, R, P], and what is left of the state before it [C, G, 1, R, 1]."""
    chunks, groups, size, heads, width = inputs.shape
    end = total[..., -1:]
    last = ids[:, -1]
    elsewhere = (ids != last.unsqueeze(1)).view(chunks, 1, 1, size)
    left = (end - total).masked_fill(elsewhere, -torch.inf).exp()
    weighted = inputs * left.transpose(2, 3).unsqueeze(-1)
    states = b.transpose(-1, -2) @ weighted.reshape(chunks, groups, size, heads * width)
    decay = end.exp() * (entering == last).view(chunks, 1, 1, 1)
    return states.view(chunks, groups, -1, heads, width), decay.unsqueeze(2)


def _from_before(before: Tensor, total: Tensor, c: Tensor, ids: Tensor, entering: Tensor) -> Tensor:
    """What tokens get from the state before their chunk: [C, G, Q, R, P]."""
    chunks, groups, state, heads, width = before.shape
    size = ids.shape[1]
    left = total.exp() * (ids == entering.unsqueeze(1)).view(chunks, 1, 1, size)
    y = c @ before.view(chunks, groups, state, heads * width)
    return y.view(chunks, groups, size, heads, width) * left.transpose(2, 3).unsqueeze(-1)


class _ChunkRecurrence(torch.autograd.Function):
    """state_c = decay_c state_(c-1) + added_c over chunks. By hand: one autograd node instead of several a chunk."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, decay: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """States before each chunk [C, G, N, R, P] and after the last [G, N, R, P]."""
        states = added.new_empty(len(added) + 1, *first.shape)
        states[0] = first
        for i in range(len(added)):
            torch.addcmul(added[i], states[i], decay[i], out=states[i + 1])
        ctx.save_for_backward(states[:-1], decay)
        return states[:-1], states[-1].clone()

    @staticmethod
    def backward(ctx: Any, grad_before: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        before, decay = ctx.saved_tensors
        grad_added = torch.empty_like(grad_before)
        carried = grad_last
        for i in reversed(range(len(grad_before))):
            grad_added[i] = carried
            carried = torch.addcmul(grad_before[i], carried, decay[i])
        grad_decay = (grad_added * before).sum(dim=(2, 4), keepdim=True)
        return grad_added, grad_decay, carried


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, *, group_size: int, eps: float) -> Tensor:
    """RMSNorm over groups of channels of y * silu(gate): the gate comes first.

    Args:
        y: [S, D].
        gate: [S, D].
        weight: [D].
        group_size: Channels that are normalised together.
        eps: Added to the mean square.

    Returns:
        [S, D], dtype of `y`.
    """
    compute = torch.promote_types(y.dtype, torch.float32)
    gated = y.to(compute) * F.silu(gate.to(compute))
    normed = F.rms_norm(gated.unflatten(-1, (-1, group_size)), (group_size,), eps=eps)
    return (normed.flatten(-2) * weight.to(compute)).to(y.dtype)
