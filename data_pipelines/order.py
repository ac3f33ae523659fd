"""Keyed order: shuffles that need a seed and a name, no state and no table."""

import hashlib

import numpy as np

_ROUNDS = 8


def keyed_permutation(positions: np.ndarray, size: int, key: str) -> np.ndarray:
    """Image of some positions under a permutation of range(size) that depends on `key` alone.

    A Feistel network on the next even number of bits, walked until the value is in range: any position costs the same,
    no table of `size` entries is made, and no library's random stream is relied upon.

    Args:
        positions: [n] integers in range(size).
        size: Number of permuted values.
        key: Any text.

    Returns:
        [n] int64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    rounds = np.frombuffer(digest, dtype="<u8")

    def scramble(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << half) | right

    values = scramble(np.asarray(positions, dtype=np.uint64))
    while (outside := values >= size).any():
        values[outside] = scramble(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; multiplication wraps modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
