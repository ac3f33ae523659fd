"""Keyed order of a source: blocks of neighbouring samples in a keyed order, their samples mixed over many blocks.

Nothing is remembered between calls: the order of an epoch follows from a seed, a name and the epoch's number. Places in
it are measured in tokens, so that equal stretches hold equally many tokens whatever the samples' lengths are, and any
place is found without walking there: a sum a block is all that is kept.
"""

import functools
import hashlib

import numpy as np


def keyed_order(size: int, key: str) -> np.ndarray:
    """A permutation of range(size) that depends on `key` alone, and on no library's random stream.

    The numbers are sorted by a 64-bit hash of themselves (the finaliser of splitmix64 over a keyed counter).

    Args:
        size: Number of values.
        key: Any text.

    Returns:
        [size] int64.
    """
    words = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), dtype="<u8")
    counter = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(_mix(_mix(counter + words[0]) ^ words[1]), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place; multiplication wraps modulo 2^64."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


class SourceOrder:
    """The endless order of one source's samples, epoch after epoch, addressed by tokens.

    Attributes:
        total: Size of one epoch.
    """

    def __init__(self, sizes: np.ndarray, *, key: str, block: int, mixed_blocks: int) -> None:
        """Add up the blocks; no order is made yet.

        Args:
            sizes: [rows] integers, how far each sample moves the place; 0 leaves a sample out.
            key: Seed and name.
            block: Neighbouring rows that stay together.
            mixed_blocks: Blocks whose rows are mixed.
        """
        self._sizes, self._key, self._block, self._mixed = sizes, key, block, mixed_blocks
        # `reduceat` would first copy all sizes to int64.
        whole = len(sizes) // block * block
        sums = sizes[:whole].reshape(-1, block).sum(axis=1, dtype=np.int64)
        self._sums = sums if whole == len(sizes) else np.append(sums, sizes[whole:].sum(dtype=np.int64))
        self.total = int(self._sums.sum())
        # Two of each, for windows that straddle a border. They are rebuilt on demand, so they are no state.
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._group = functools.lru_cache(maxsize=2)(self._make_group)

    def rows(self, first: int, last: int) -> np.ndarray:
        """The samples that begin in [first, last) of the endless order; [n] int64, in order."""
        found = [np.empty(0, dtype=np.int64)]
        while first < last:
            epoch, start = divmod(first, self.total)
            stop = min(self.total, start + last - first)
            _, bounds = self._epoch(epoch)
            group = int(np.searchsorted(bounds, start, side="right")) - 1
            stop = min(stop, int(bounds[group + 1]))
            rows, begins = self._group(epoch, group)
            found.append(rows[np.searchsorted(begins, start) : np.searchsorted(begins, stop)])
            first += stop - start
        return np.concatenate(found)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the blocks, and where each group of them begins."""
        blocks = keyed_order(len(self._sums), f"blocks {self._key} {epoch}")
        groups = np.add.reduceat(self._sums[blocks], np.arange(0, len(blocks), self._mixed))
        return blocks, np.concatenate([[0], np.cumsum(groups)])

    def _make_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a group in order, and where each begins."""
        blocks, bounds = self._epoch(epoch)
        chosen = blocks[group * self._mixed : (group + 1) * self._mixed, None] * self._block
        rows = (chosen + np.arange(self._block)).ravel()
        rows = rows[rows < len(self._sizes)]
        rows = rows[keyed_order(len(rows), f"rows {self._key} {epoch} {group}")]
        sizes = self._sizes[rows].astype(np.int64)
        kept = sizes > 0
        rows, sizes = rows[kept], sizes[kept]
        return rows, bounds[group] + np.cumsum(sizes) - sizes
