"""Exchanges between the context parallel ranks of a pack, with their gradients.

A pack's S tokens lie on R ranks in their natural order, S / R each. Attention and one form of the Mamba layer turn that
into all tokens of a part of the heads and back; each turn is one collective.

Shape legend: S tokens in a pack, R ranks, L = S / R tokens of this rank, C columns, Z any trailing sizes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def scatter_columns(parts: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """From all columns of this rank's tokens to this rank's columns of all tokens, for several tensors in one exchange.

    Args:
        parts: [L, C] each, with its own C divisible by R; rank r gets columns r * C / R to (r + 1) * C / R.
        group: The context parallel group.

    Returns:
        [S, C / R] each, tokens in their natural order.
    """
    ranks = group.size()
    assert all(part.shape[1] % ranks == 0 for part in parts), "the layout check refuses columns that do not divide"
    by_rank = torch.cat([part.unflatten(1, (ranks, -1)).transpose(0, 1) for part in parts], dim=2)
    swapped = _AllToAll.apply(by_rank, group)
    return swapped.flatten(0, 1).split([part.shape[1] // ranks for part in parts], dim=1)


def gather_columns(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `scatter_columns` for one tensor: [S, C / R] -> [L, C]."""
    swapped = _AllToAll.apply(part.unflatten(0, (group.size(), -1)), group)
    return swapped.transpose(0, 1).flatten(1)


def gather_tokens(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[L, *Z] -> [S, *Z], every rank's tokens; backward sums what all ranks have to say of a token."""
    return _GatherTokens.apply(part, group)


def exchange_rows(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends the first `send[0]` rows to rank 0 of the group, the next `send[1]` to rank 1, and so on.

    Args:
        rows: [sum(send), *Z].
        send: Rows for each rank, known on the host.
        receive: Rows from each rank.
        group: Any group; every rank calls it, with rows or without.

    Returns:
        [sum(receive), *Z], in the order of the ranks they came from.
    """
    return _ExchangeRows.apply(rows, send, receive, group)


def every_rank(part: Tensor, group: dist.ProcessGroup) -> "Gathered":
    """Starts to collect equal tensors [*Z] of all ranks, without gradient; work goes on until `Gathered.wait`."""
    out = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    return Gathered(
        out.unflatten(0, (group.size(), -1)),
        dist.all_gather_into_tensor(out, part.contiguous(), group=group, async_op=True),
    )


class Gathered:
    """A collection under way."""

    def __init__(self, out: Tensor, work: Any) -> None:
        self._out, self._work = out, work

    def wait(self) -> Tensor:
        """[R, *Z]; on a GPU the stream waits, not the host."""
        self._work.wait()
        return self._out


class _AllToAll(torch.autograd.Function):
    """[R, *Z]: entry r goes to rank r; entry r of the result came from rank r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swap(grad, ctx.group), None


def _swap(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(out, part.contiguous(), group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Summed in float32 at least: with many ranks a sum in bf16 would lose what one kernel over all queries keeps.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        out = wide.new_empty(wide.shape[0] // ctx.group.size(), *wide.shape[1:])
        dist.reduce_scatter_tensor(out, wide, group=ctx.group)
        return out.to(grad.dtype), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _swap_rows(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap_rows(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _swap_rows(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out
