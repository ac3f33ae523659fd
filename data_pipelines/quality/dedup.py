"""Samples that are there twice: exactly, or nearly.

* `exact`: messages and media are the same bytes; ids do not count.
* `near`: as many media of the same kinds, images that look alike, videos of the same bytes, and texts that are alike in
  both parts, what was asked and what was answered. Many questions about one picture are no duplicates.

Every pair is verified; candidates are those that share a band of the text signature and of the first image's hash. Of
two alike samples the one that comes first is kept, in the order of the folders as they are named and, inside a folder,
of other splits before `train`: what leaks from a held-out split leaves the training data.

Shape legend: N samples, H numbers of a signature, I images of the sample that has most.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.dataset import Dataset, StoredSample, read_info
from data_pipelines.exceptions import DataError
from data_pipelines.processes import in_order, process_pool
from data_pipelines.quality.checks import content_hash
from data_pipelines.quality.fingerprint import SIGNATURE, image_hash, text_signature
from data_pipelines.schema import content_items, media_items

_CHUNK = 64
_CHUNKS_AHEAD = 4
_BANDS, _ROWS = 25, 5
"""Of the text signature: a pair of similarity 0.8 shares a band with probability 0.99995."""


@dataclass(frozen=True)
class Duplicate:
    """A sample that another one makes superfluous.

    Attributes:
        kind: `exact` or `near`.
        folder: Its dataset folder.
        split: Its split.
        key: Its id.
        of_folder: Dataset folder of the sample that comes first.
        of_split: Split of that one.
        of_key: Id of that one.
        text: Estimated similarity of the less alike part of the texts, 0 to 1.
        image_bits: Bits in which the least alike pair of images differs, of 64.
    """

    kind: str
    folder: str
    split: str
    key: str
    of_folder: str
    of_split: str
    of_key: str
    text: float
    image_bits: int

    def reason(self) -> str:
        """Why the sample may be set aside."""
        what = "same messages and media as"
        if self.kind == "near":
            what = f"texts {self.text:.2f} alike, images differ in {self.image_bits} of 64 bits:"
        return f"duplicate: {what} {self.of_folder} {self.of_split}/{self.of_key}"


@dataclass(frozen=True)
class _Part:
    folder: Path
    split: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a search.

    Attributes:
        samples: Samples that were compared.
        unreadable: Samples that could not be read, which `validate` names.
        duplicates: All but the first of alike samples.
    """

    samples: int
    unreadable: int
    duplicates: list[Duplicate]

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON document."""
        return asdict(self)

    def count(self, kind: str) -> int:
        """Duplicates of a kind."""
        return sum(duplicate.kind == kind for duplicate in self.duplicates)

    def across_splits(self) -> int:
        """Duplicates of a sample of another split or folder: what would be trained on and then asked."""
        return sum((d.folder, d.split) != (d.of_folder, d.of_split) for d in self.duplicates)


@dataclass(frozen=True)
class _Prints:
    """Fingerprints of N samples.

    Attributes:
        content: [N] uint64, hash of messages and media.
        media: [N] uint64, hash of kinds and, of videos, bytes; alike only where equal.
        asked: [N, H] uint32, signature of system, user and tool texts.
        answered: [N, H] uint32, signature of the answers.
        images: [N, I] uint64, perceptual hashes, padded with 0.
        rows: [N] int64, row in the part.
        parts: [N] int32, number of the part.
    """

    content: np.ndarray
    media: np.ndarray
    asked: np.ndarray
    answered: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    parts: np.ndarray


def find_duplicates(
    folders: Sequence[Path],
    *,
    text_similarity: float = 0.8,
    image_bits: int = 4,
    exact_only: bool = False,
    workers: int = 1,
) -> Report:
    """Compare all samples of some dataset folders with each other. Needs about 1.1 kB of memory a sample.

    Args:
        folders: Dataset folders, in the order in which samples are kept.
        text_similarity: Least Jaccard similarity of texts that count as alike.
        image_bits: Most bits of 64 in which images that count as alike differ.
        exact_only: Do not look for near duplicates.
        workers: Processes.

    Raises:
        DataError: No dataset folder, or one that is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("a dataset folder is named twice: each sample would be the duplicate of itself")
    parts = [
        _Part(folder, split)
        for folder in folders
        for split in sorted(read_info(folder)["splits"], key=lambda name: (name == "train", name))
    ]
    datasets = [Dataset.open(part.folder, part.split) for part in parts]
    prints, unreadable = _prints(parts, datasets, workers)
    exact = _exact(prints)
    left = np.ones(len(prints.rows), dtype=bool)
    left[list(exact)] = False
    found = {number: ("exact", first, 1.0, 0) for number, first in exact.items()}
    if not exact_only:
        for number, like in _near(prints, left, text_similarity, image_bits).items():
            found[number] = ("near", *like)

    def place(number: int) -> tuple[str, str, str]:
        part, dataset = parts[prints.parts[number]], datasets[prints.parts[number]]
        return str(part.folder), part.split, dataset.key(int(prints.rows[number]))

    duplicates = [
        Duplicate(kind, *place(number), *place(first), round(text, 3), bits)
        for number, (kind, first, text, bits) in sorted(found.items())
    ]
    for dataset in datasets:
        dataset.close()
    return Report(samples=len(prints.rows), unreadable=unreadable, duplicates=duplicates)


type _Print = tuple[int, int, np.ndarray, np.ndarray, list[int]] | None


def _prints(parts: Sequence[_Part], datasets: Sequence[Dataset], workers: int) -> tuple[_Prints, int]:
    found: list[tuple[int, int, tuple[int, int, np.ndarray, np.ndarray, list[int]]]] = []
    unreadable = 0
    chunks = [
        (number, range(start, min(start + _CHUNK, len(dataset))))
        for number, dataset in enumerate(datasets)
        for start in range(0, len(dataset), _CHUNK)
    ]
    for (number, rows), printed in _printed(parts, chunks, min(workers, len(chunks))):
        for row, one in zip(rows, printed, strict=True):
            if one is None:
                unreadable += 1
            else:
                found.append((number, row, one))
    most = max((len(one[4]) for _, _, one in found), default=0)
    images = np.zeros((len(found), max(1, most)), dtype=np.uint64)
    for i, (_, _, one) in enumerate(found):
        images[i, : len(one[4])] = one[4]
    empty = np.empty((0, SIGNATURE), dtype=np.uint32)
    return (
        _Prints(
            content=np.array([one[0] for _, _, one in found], dtype=np.uint64),
            media=np.array([one[1] for _, _, one in found], dtype=np.uint64),
            asked=np.stack([one[2] for _, _, one in found]) if found else empty,
            answered=np.stack([one[3] for _, _, one in found]) if found else empty,
            images=images,
            rows=np.array([row for _, row, _ in found], dtype=np.int64),
            parts=np.array([number for number, _, _ in found], dtype=np.int32),
        ),
        unreadable,
    )


def _printed(
    parts: Sequence[_Part], chunks: list[tuple[int, range]], workers: int
) -> Iterator[tuple[tuple[int, range], list[_Print]]]:
    if workers <= 1:
        _start(parts)
        yield from ((chunk, _print_chunk(chunk)) for chunk in chunks)
        return
    with process_pool(workers, _start, parts) as pool:
        yield from in_order(pool, _print_chunk, chunks, ahead=_CHUNKS_AHEAD * workers)


_datasets: list[Dataset] = []


def _start(parts: Sequence[_Part]) -> None:
    global _datasets
    _datasets = [Dataset.open(part.folder, part.split) for part in parts]


def _print_chunk(chunk: tuple[int, range]) -> list[_Print]:
    number, rows = chunk
    return [_print(_datasets[number], row) for row in rows]


def _print(dataset: Dataset, row: int) -> _Print:
    try:
        stored = dataset.read(row)
        images, kinds = _media(stored)
        content = content_hash(stored)
    except (DataError, OSError, ValueError):
        return None
    asked: list[str] = []
    answered: list[str] = []
    for message in stored.record["messages"]:
        text = "".join(item["text"] for item in content_items(message) if item["type"] == "text")
        text += "".join(f" {call}" for call in message.get("tool_calls", ()))
        (answered if message["role"] == "assistant" else asked).append(text)
    return content, kinds, text_signature("\n".join(asked)), text_signature("\n".join(answered), part=1), images


def _media(stored: StoredSample) -> tuple[list[int], int]:
    sha = hashlib.sha256()
    images = []
    for item in media_items(stored.record):
        sha.update(item.kind.encode())
        if item.kind == "image":
            images.append(image_hash(stored.media[item.member]))
        else:
            sha.update(hashlib.sha256(stored.media[item.member]).digest())
    return images, int.from_bytes(sha.digest()[:8])


def _exact(prints: _Prints) -> dict[int, int]:
    """Number of each sample whose content was there before, and of the first that has it."""
    _, first, inverse = np.unique(prints.content, return_index=True, return_inverse=True)
    return {i: int(first[group]) for i, group in enumerate(inverse) if first[group] != i}


def _near(prints: _Prints, left: np.ndarray, similarity: float, bits: int) -> dict[int, tuple[int, float, int]]:
    """Samples that an earlier one is like: number of that one, similarity, bits. `left` is marked on the way."""
    found: dict[int, tuple[int, float, int]] = {}
    both = np.minimum(prints.asked, prints.answered)
    for text in range(_BANDS):
        text_key = _mix(both[:, text * _ROWS : (text + 1) * _ROWS].astype(np.uint64), prints.media)
        # Of bits + 1 bands two hashes that differ in as many bits share one.
        for image_band in _image_bands(prints.images[:, 0], bits):
            numbers = np.flatnonzero(left)
            keys = _mix(image_band[numbers, None], text_key[numbers])
            order = np.argsort(keys, kind="stable")
            cuts = np.flatnonzero(np.diff(keys[order])) + 1
            for group in np.split(numbers[order], cuts):
                if len(group) > 1:
                    _compare(prints, group, left, similarity, bits, found)
    return found


def _mix(columns: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """[N, C] uint64 and [N] uint64 -> [N] uint64: equal rows give equal keys, others almost never do."""
    key = seed.copy()
    for column in columns.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(32)
    return key


def _image_bands(hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    if not hashes.any():  # no images: all bands would be one
        yield hashes
        return
    edges = np.linspace(0, 64, bits + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        yield (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)


def _compare(
    prints: _Prints,
    group: np.ndarray,
    left: np.ndarray,
    similarity: float,
    bits: int,
    found: dict[int, tuple[int, float, int]],
) -> None:
    """Compare candidates with each other, every one that is kept with all behind it."""
    group = np.sort(group)
    while len(group) > 1:
        first, group = group[0], group[1:]
        group = group[left[group]]
        # The cheapest comparison first: the texts of thousands of questions may all be one.
        distances = np.bitwise_count(prints.images[group] ^ prints.images[first]).max(axis=1)
        close = (distances <= bits) & (prints.media[group] == prints.media[first])
        texts = np.minimum(
            (prints.asked[group[close]] == prints.asked[first]).mean(axis=1),
            (prints.answered[group[close]] == prints.answered[first]).mean(axis=1),
        )
        for number, text, distance in zip(group[close], texts, distances[close], strict=True):
            if text >= similarity:
                found[int(number)] = (int(first), float(text), int(distance))
                left[number] = False
        group = group[left[group]]
