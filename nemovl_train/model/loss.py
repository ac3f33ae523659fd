"""Output layer and cross entropy in one, at supervised positions only, over a vocabulary that ranks share.

Logits exist for some rows at a time, in the weights' dtype; float32 exists for a block of their columns. They become
their own gradient in place, which is multiplied with the weight and with the hidden states. Where the gradient of each
loss is known beforehand, as it is in training, all of that is done in forward and logits are made once. Otherwise
forward keeps one number a row, the log of the softmax's denominator, and backward makes them again. On CUDA both passes
over logits are Triton kernels. Tensor parallel ranks exchange three numbers a row.

Shape legend: S tokens in a pack, M supervised ones, H hidden, V vocabulary rows of this rank, R ranks.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemovl_train.model.chunks import FLOAT_LOGITS, rows_at_a_time
from nemovl_train.parallel import cpu
from nemovl_train.parallel.exchange import every_rank

cpu.install_if_no_cuda()

from megatron.core import tensor_parallel  # noqa: E402

IGNORE = -100
"""Label of a position without a target."""


def token_loss(
    hidden: Tensor,
    head: Any,
    labels: Tensor,
    supervised: Tensor | None = None,
    *,
    gradient: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross entropy of every position. Weighting is the caller's: `(token_loss(...) * loss_weight).sum()`.

    Padding rows of the vocabulary are ordinary rows, as in the released weights.

    Args:
        hidden: [S, 1, H] after the final norm; this rank's part of S with sequence parallelism.
        head: The output layer: a column parallel linear without bias, as `LanguageModel.output_layer`.
        labels: [S] int64, the target predicted at each position, `IGNORE` where there is none. The same on every
            tensor parallel rank.
        supervised: [M] int64, positions with a target; None asks `labels`, which waits for the device.
        gradient: [S] float32, what backward will bring for each loss: its weight, where backward starts from the
            weighted sum. Spares a fourth of the matrix products; other numbers from backward are an error, which the
            device finds without anybody waiting for it. None where they are not known.
        chunk: Most positions at a time; `rows_at_a_time` when None.

    Returns:
        [S] float32, zero where there is no label. Connected to the graph even if there is none anywhere, so that every
        rank runs the same collectives.
    """
    if head.sequence_parallel:
        # Backward sums over ranks and splits again, which the head's own communication would do twice.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=head.tp_group)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=head.tp_group)
    positions = torch.nonzero(labels != IGNORE).squeeze(1) if supervised is None else supervised
    targets = labels.index_select(0, positions)
    chunk = chunk or rows_at_a_time(len(head.weight), head.weight.element_size())
    operands = hidden.squeeze(1), head.weight, positions, targets, head.tp_group, chunk
    if gradient is not None and torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad):
        losses = _WithGradient.apply(*operands, gradient.index_select(0, positions))
    else:
        losses = _LinearCrossEntropy.apply(*operands)
    return torch.zeros(len(labels), device=hidden.device).index_copy(0, positions, losses)


class _LinearCrossEntropy(torch.autograd.Function):
    """Hidden [S, H], weight [V, H], positions [M], targets [M] -> [M] float32, the same on every rank of the group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        positions: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        chunk: int,
    ) -> Tensor:
        local = targets - group.rank() * len(weight)
        statistics = _kernels(hidden).statistics
        found = [
            statistics(F.linear(hidden.index_select(0, p), weight), t) for p, t in _chunks(chunk, positions, local)
        ]
        log_sum, own = _over_ranks(torch.cat(found, dim=1), group)
        ctx.save_for_backward(hidden, weight, positions, local, log_sum)
        ctx.chunk = chunk
        return log_sum - own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, positions, local, log_sum = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad)
        to_gradient = _kernels(hidden).to_gradient
        for p, t, s, g in _chunks(ctx.chunk, positions, local, log_sum, grad):
            rows = hidden.index_select(0, p)
            logits = F.linear(rows, weight)
            to_gradient(logits, t, s, g)
            gradients.add(p, rows, logits)
            del logits  # or two chunks' logits would exist while the next are made
        return *gradients.found(), None, None, None, None


class _WithGradient(torch.autograd.Function):
    """The same, and the gradient [M] of every loss, known in forward; what backward brings has to equal it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        positions: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        chunk: int,
        expected: Tensor,
    ) -> Tensor:
        local = targets - group.rank() * len(weight)
        kernels, gradients = _kernels(hidden), _Gradients(hidden, weight, ctx.needs_input_grad)
        losses = torch.empty(len(positions), device=hidden.device)
        for p, t, g, loss in _chunks(chunk, positions, local, expected, losses):
            rows = hidden.index_select(0, p)
            logits = F.linear(rows, weight)
            log_sum, own = _over_ranks(kernels.statistics(logits, t), group)
            torch.sub(log_sum, own, out=loss)
            kernels.to_gradient(logits, t, log_sum, g)
            gradients.add(p, rows, logits)
            del logits
        ctx.save_for_backward(expected)
        # Not saved tensors: the weight's may be a view of the optimizer's buffer, which changes before backward.
        ctx.gradients = gradients.found()
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (expected,) = ctx.saved_tensors
        same = (grad == expected) | (grad.isnan() & expected.isnan())  # a step that is not finite is dropped later
        torch._assert_async(same.all(), "a loss was differentiated with other weights than token_loss(gradient=) said")
        of_hidden, of_weight = ctx.gradients
        del ctx.gradients
        return of_hidden, of_weight, None, None, None, None, None


class _Gradients:
    """Sums of the products of logits' gradients: for hidden states [S, H] and the weight [V, H], where they are needed.

    Args:
        hidden: [S, H].
        weight: [V, H].
        needed: Whether each of the two has a gradient.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> None:
        self._weight = weight
        self._of_hidden = torch.zeros_like(hidden) if needed[0] else None
        self._total: Tensor | None = None
        self._of_weight: Tensor | None = None
        if needed[1]:
            self._total, self._of_weight = _weight_gradient(weight)

    def add(self, positions: Tensor, rows: Tensor, of_logits: Tensor) -> None:
        """Some positions [m], their hidden states [m, H] and the gradient of their logits [m, V]."""
        if self._of_hidden is not None:
            self._of_hidden.index_copy_(0, positions, of_logits @ self._weight)
        if self._total is not None:
            _add_product(self._total, of_logits, rows)

    def found(self) -> tuple[Tensor | None, Tensor | None]:
        """What autograd gets for hidden states and weight."""
        if self._of_weight is None and self._total is not None:
            return self._of_hidden, self._total.to(self._weight.dtype)
        return self._of_hidden, self._of_weight


def _kernels(tensor: Tensor) -> Any:
    """`statistics` and `to_gradient`: Triton's on CUDA, else this module's own."""
    if not tensor.is_cuda:
        return SimpleNamespace(statistics=_statistics, to_gradient=_to_gradient)
    from nemovl_train.model.kernels import cross_entropy

    return cross_entropy


def _chunks(chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(chunk) for tensor in tensors), strict=True)


def _blocks(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First column of each block of columns, and the block."""
    width = max(FLOAT_LOGITS // max(len(logits), 1), 1)
    return ((begin, logits[:, begin : begin + width]) for begin in range(0, logits.shape[1], width))


def _statistics(logits: Tensor, local: Tensor) -> Tensor:
    """[3, M] float32: largest logit here, sum of exponentials relative to it, and the target's if it is here, else 0.

    Args:
        logits: [M, V].
        local: [M] targets counted from this rank's first row; outside 0 to V - 1 where another rank has it.
    """
    largest = logits.amax(1).float()
    total = torch.zeros_like(largest)
    for _, block in _blocks(logits):
        total += torch.sub(block, largest[:, None]).exp_().sum(1)
    here = (local >= 0) & (local < logits.shape[1])
    own = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1).float()
    return torch.stack([largest, total, own * here])


def _over_ranks(statistics: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[3, M] of this rank -> log of the sum of all exponentials [M], and the targets' logits [M]."""
    if group.size() == 1 or not statistics.shape[1]:
        largest, total, own = statistics
        return largest + total.log(), own
    # All ranks add up the same numbers in the same order, so that their losses are equal bit by bit.
    largests, totals, owns = every_rank(statistics, group).wait().unbind(1)
    largest = largests.amax(0)
    return largest + (totals * (largests - largest).exp()).sum(0).log(), owns.sum(0)


def _to_gradient(logits: Tensor, local: Tensor, log_sum: Tensor, grad: Tensor) -> None:
    """Replaces logits [M, V] by their gradient, (softmax - 1 at the target) * grad of the row's loss."""
    for begin, block in _blocks(logits):
        wide = torch.sub(block, log_sum[:, None]).exp_()
        column = local - begin
        here = (column >= 0) & (column < block.shape[1])
        wide.scatter_add_(1, column.clamp(0, block.shape[1] - 1)[:, None], -here.to(wide.dtype)[:, None])
        block.copy_(wide.mul_(grad[:, None]))


def _weight_gradient(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where to add the weight's gradient, and what to hand to autograd when that is the optimizer's own buffer.

    megatron-core's data parallel wrapper gives a parameter `main_grad` and, where it finds `grad_added_to_main_grad`
    set, drops the gradient that autograd brings. Of that only the presence counts: it is a view of the same memory.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device), None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return buffer, buffer.view(-1).view(weight.dtype)[: weight.numel()].view(weight.shape)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left [M, V]^T right [M, H] to total [V, H], summed in float32."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))
