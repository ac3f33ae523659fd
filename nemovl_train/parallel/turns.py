"""Reads of the same files by many nodes, some nodes at a time."""

import os
from collections.abc import Callable

import torch.distributed as dist


def in_turns[T](action: Callable[[], T], nodes_at_once: int) -> T:
    """Run an action on every rank, on so many nodes at a time. Collective.

    A node's ranks come together: what one of them reads, the others find in the node's memory.

    Args:
        action: Without collectives inside.
        nodes_at_once: Nodes whose turn it is at the same time; 0 for all.

    Returns:
        This rank's result.

    Raises:
        Exception: What this rank's action raised, after every turn is over.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = -(-dist.get_world_size() // per_node)
    if not nodes_at_once or nodes <= nodes_at_once:
        return action()
    mine, failure, result = dist.get_rank() // per_node // nodes_at_once, None, []
    for turn in range(-(-nodes // nodes_at_once)):
        if turn == mine:
            try:
                result.append(action())
            except Exception as error:
                failure = error
        dist.barrier()
    if failure is not None:
        raise failure
    return result[0]
