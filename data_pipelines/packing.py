"""Bin packing of samples into packs, on lengths alone."""

import bisect
import heapq
from collections.abc import Sequence

from data_pipelines.config import PACKING_MODES


def pack_lengths(
    lengths: Sequence[int], capacity: int, mode: str, packs: int | None = None
) -> tuple[list[list[int]], list[int]]:
    """Put items into packs of `capacity` tokens.

    Args:
        lengths: Tokens of each item, none above `capacity`.
        capacity: Tokens of a pack.
        mode: `bfd` places the longest first, each where it leaves the least room; `balanced` places the longest first,
            each into the emptiest pack (the balance-aware knapsack of Eagle 2, arXiv 2501.14818), so that packs hold
            long and short items alike; `sequential` fills one pack after the other; `none` gives every item its own.
        packs: Exactly this many; as many as needed when None.

    Returns:
        Item numbers of each pack, rising inside a pack, and the items for which `packs` had no room. A pack is empty
        only when there are fewer items than packs.
    """
    assert mode in PACKING_MODES, mode
    most = len(lengths) if packs is None else packs
    if mode == "none":
        bins, left = [[i] for i in range(len(lengths))][:most], list(range(most, len(lengths)))
    elif mode == "sequential":
        bins, left = _pack_sequential(lengths, capacity, most)
    elif mode == "balanced":
        bins, left = _pack_balanced(lengths, capacity, packs)
    else:
        bins, left = _pack_best_fit(lengths, capacity, most)
    if packs is not None:
        _spread(bins, packs)
    return [sorted(pack) for pack in bins], sorted(left)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def _pack_best_fit(lengths: Sequence[int], capacity: int, most: int) -> tuple[list[list[int]], list[int]]:
    bins: list[list[int]] = []
    over: list[int] = []
    count = len(lengths)
    room: list[int] = []  # tokens left * count + pack number, sorted: plain integers compare faster than pairs
    for item in _longest_first(lengths):
        length = lengths[item]
        at = bisect.bisect_left(room, length * count)
        if at < len(room):
            left, pack = divmod(room.pop(at), count)
            bins[pack].append(item)
            left -= length
        elif len(bins) < most:
            bins.append([item])
            left, pack = capacity - length, len(bins) - 1
        else:
            over.append(item)
            continue
        if left:
            bisect.insort(room, left * count + pack)
    return bins, over


def _pack_balanced(lengths: Sequence[int], capacity: int, packs: int | None) -> tuple[list[list[int]], list[int]]:
    """Without a number of packs it starts from the fewest that the sum allows and opens more where the sum misled."""
    start = packs if packs is not None else -(-sum(lengths) // capacity)
    bins: list[list[int]] = [[] for _ in range(start)]
    over: list[int] = []
    lightest = [(0, pack) for pack in range(start)]
    for item in _longest_first(lengths):
        length = lengths[item]
        used, pack = lightest[0] if lightest else (capacity, -1)
        if used + length <= capacity:
            bins[pack].append(item)
            heapq.heapreplace(lightest, (used + length, pack))
        elif packs is None:
            bins.append([item])
            heapq.heappush(lightest, (length, len(bins) - 1))
        else:
            over.append(item)
    return bins, over


def _pack_sequential(lengths: Sequence[int], capacity: int, most: int) -> tuple[list[list[int]], list[int]]:
    bins: list[list[int]] = []
    left = 0
    for item, length in enumerate(lengths):
        if not bins or length > left:
            if len(bins) == most:
                return bins, list(range(item, len(lengths)))
            bins.append([])
            left = capacity
        bins[-1].append(item)
        left -= length
    return bins, []


def _spread(bins: list[list[int]], packs: int) -> None:
    """Fill up to `packs` packs by halving those with the most items: the same tokens in one more pack."""
    by_count = [(-len(pack), number) for number, pack in enumerate(bins)]
    heapq.heapify(by_count)
    while len(bins) < packs:
        count, number = by_count[0] if by_count else (0, -1)
        if count > -2:
            bins.append([])
            continue
        donor = bins[number]
        bins.append(donor[1::2])
        bins[number] = donor[::2]
        heapq.heapreplace(by_count, (-len(bins[number]), number))
        heapq.heappush(by_count, (-len(bins[-1]), len(bins) - 1))
