"""Keyed randomness: sample i of a set is a function of (seed, set, split, i) and of nothing else."""

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
_HELDOUT_SHARE = 8  # one content in eight is held out


def keyed_random(seed: int, *key: str | int) -> random.Random:
    """A generator that depends on the seed and the key only, not on how many samples came before."""
    text = "/".join(str(part) for part in (seed, *key))
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16]))


def split_of(content: str) -> str:
    """The split a content belongs to: a hash decides, so no content can be in both, whatever the seed or the size."""
    return HELDOUT if hashlib.sha256(content.encode()).digest()[0] % _HELDOUT_SHARE == 0 else TRAIN


def draw_in_split[T](
    rng: random.Random, split: str, draw: Callable[[random.Random], T], content: Callable[[T], str] = str
) -> T:
    """Draws until the content falls in the split (eight draws on average for the held-out one)."""
    while True:
        item = draw(rng)
        if split_of(content(item)) == split:
            return item


@cache
def _order(seed: int, name: str, split: str, size: int) -> tuple[int, ...]:
    order = list(range(size))
    keyed_random(seed, name, split, "order").shuffle(order)
    return tuple(order)


def keyed_pick[T](pool: Sequence[T], seed: int, name: str, split: str, index: int) -> T:
    """Item `index` of a keyed shuffle of the pool: every item comes up once before any comes up twice."""
    return pool[_order(seed, name, split, len(pool))[index % len(pool)]]
