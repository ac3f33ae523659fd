"""File work that one process does for all, so that no rank waits for one that has given up."""

from collections.abc import Callable
from typing import Any

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


def from_every_rank[T](item: T) -> list[T]:
    """The ranks' items, in the order of their numbers. Collective."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
