"""Bin packing of samples into packs, on lengths alone."""

import bisect
from collections.abc import Sequence

from data_pipelines.config import PACKING_MODES


def pack_lengths(lengths: Sequence[int], capacity: int, mode: str) -> list[list[int]]:
    """Put items into packs of `capacity` tokens.

    Args:
        lengths: Tokens of each item, none above `capacity`.
        capacity: Tokens of a pack.
        mode: `bfd` places the longest first, each where it leaves the least room; `sequential` fills one pack after
            the other; `none` gives every item its own.

    Returns:
        Item numbers of each pack, rising inside a pack.
    """
    assert mode in PACKING_MODES, mode
    if mode == "none":
        return [[i] for i in range(len(lengths))]
    if mode == "sequential":
        return _pack_sequential(lengths, capacity)
    return _pack_best_fit(lengths, capacity)


def _pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    count = len(lengths)
    room: list[int] = []  # tokens left * count + pack number, sorted: plain integers compare faster than pairs
    for item in sorted(range(count), key=lengths.__getitem__, reverse=True):
        length = lengths[item]
        at = bisect.bisect_left(room, length * count)
        if at == len(room):
            packs.append([item])
            left, pack = capacity - length, len(packs) - 1
        else:
            left, pack = divmod(room.pop(at), count)
            packs[pack].append(item)
            left -= length
        if left:
            bisect.insort(room, left * count + pack)
    return [sorted(pack) for pack in packs]


def _pack_sequential(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    left = 0
    for item, length in enumerate(lengths):
        if not packs or length > left:
            packs.append([])
            left = capacity
        packs[-1].append(item)
        left -= length
    return packs
