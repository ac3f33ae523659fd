"""File work that one process does for all, so that no rank waits for one that has given up."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nemovl_train.exceptions import UserError


def on_first_rank[T](action: Callable[[], T]) -> T:
    """Run an action on rank 0 and give every rank its result, or its error. Collective.

    Args:
        action: What rank 0 does, without collectives inside; its result must be picklable.

    Returns:
        The action's result, on every rank.

    Raises:
        UserError: What the action raised, on every rank; any other error arrives elsewhere as a RuntimeError.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            outcome[1] = error if isinstance(error, UserError) else RuntimeError(f"the first process failed: {error!r}")
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_any_rank(flags: Sequence[bool], group: dist.ProcessGroup) -> list[bool]:
    """Whether each flag is set on some rank. Collective, and on the host: no device waits for it.

    Args:
        flags: This rank's.
        group: A group of all ranks whose backend takes tensors of the CPU.
    """
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return [bool(vote) for vote in votes.tolist()]


def from_every_rank[T](item: T) -> list[T]:
    """The ranks' items, in the order of their numbers. Collective."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
