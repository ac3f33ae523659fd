"""Two passes over logits in Triton: a row's softmax statistics, and logits turned into their gradient in place.

A row of 131,072 logits in bfloat16 is read once for the first and read and written once for the second; everything in
between is float32 in registers.

Shape legend: M rows, V columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _statistics_kernel(logits, local, out, rows, stride, columns: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    lanes = tl.arange(0, BLOCK)
    # Every lane keeps a maximum and a sum of its own, and they meet once, at the end of the row.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + lanes
        value = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        kept = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(largest - kept) + tl.exp(value - kept)
        largest = higher
    most = tl.max(largest, 0)
    tl.store(out + row, most)
    tl.store(out + rows + row, tl.sum(total * tl.exp(largest - most), 0))
    target = tl.load(local + row)
    here = (target >= 0) & (target < columns)
    tl.store(out + 2 * rows + row, tl.load(start + target, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits, local, log_sum, grad, stride, columns: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + column
    value = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
    probability = tl.exp(value - tl.load(log_sum + row))
    probability -= tl.where(column == tl.load(local + row), 1.0, 0.0)
    tl.store(place, (probability * tl.load(grad + row)).to(logits.dtype.element_ty), mask=column < columns)


def statistics(logits: Tensor, local: Tensor) -> Tensor:
    """[3, M] float32: largest logit here, sum of exponentials relative to it, and the target's if it is here, else 0.

    Args:
        logits: [M, V], rows contiguous.
        local: [M] int64 targets counted from the first column; outside 0 to V - 1 where another rank has it.
    """
    rows, columns = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _launch(_statistics_kernel, (rows,), logits, local, out, rows, logits.stride(0), columns)
    return out


def to_gradient(logits: Tensor, local: Tensor, log_sum: Tensor, grad: Tensor) -> None:
    """Replaces logits by their gradient, (softmax - 1 at the target) * gradient of the row's loss.

    Args:
        logits: [M, V], rows contiguous.
        local: [M] int64, as in `statistics`.
        log_sum: [M] float32, log of the sum of all exponentials.
        grad: [M] float32.
    """
    rows, columns = logits.shape
    if rows:
        blocks = triton.cdiv(columns, _BLOCK)
        _launch(_gradient_kernel, (rows, blocks), logits, local, log_sum, grad, logits.stride(0), columns)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    kernel[grid](*arguments, BLOCK=_BLOCK, num_warps=_WARPS)
