"""What every reader gives: units of a source, their rows, and the rows that could not be read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class Unit:
    """A piece of a source that one worker imports on its own; the same pieces whatever the number of workers.

    Attributes:
        split: Split that its samples go to.
        path: File, relative to the source folder.
        start: First byte, row or page; what it counts is the reader's business.
        stop: End of the range.
        first: Number of its first row in the file, from 0, for messages and identifiers.
        files: Where a unit is several small files: their paths, relative to the source folder.
        heldout: Only the samples that are held out (True) or that are not (False); all when None.
    """

    split: str
    path: str
    start: int = 0
    stop: int = 0
    first: int = 0
    files: tuple[str, ...] = ()
    heldout: bool | None = None


@dataclass(frozen=True)
class Row:
    """One row of a source as it was found.

    Attributes:
        where: Place to show to a person: `train.jsonl:12`.
        position: The same as an identifier: unique in the source, without blanks.
        values: Fields of the row.
        members: Media that came with the row, by name.
        folder: Folder of the file it came from: media named in the row may lie there.
    """

    where: str
    position: str
    values: Mapping[str, Any]
    members: Mapping[str, bytes] = field(default_factory=dict)
    folder: Path = Path()


@dataclass(frozen=True)
class Rejected:
    """A row that did not become a sample.

    Attributes:
        where: Place in the source.
        key: Its id, empty when it could not be read that far.
        reason: `read`, `row`, `media`, `record` or `duplicate_id`.
        message: What is wrong and what to do about it.
    """

    where: str
    key: str
    reason: str
    message: str


class Reader(Protocol):
    """How one kind of file is cut into units and read."""

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """Units of a source, in the order of the dataset.

        Args:
            source: File or folder.
            split: Overrides the names found in the source.
            roots: Folders that links in the source may lead to.

        Raises:
            DataError: A file that is no file of the format, or a link that leads elsewhere.
        """

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Rows of a unit, in order."""


def position_of(path: str, number: int) -> str:
    """Identifier of a row by its file and its number.

    The whole relative path is in it, percent-encoded (RFC 3986), so that no two files share one: `a/b.csv` is
    `a%2Fb.csv`, and neither `a-b.csv` nor `a/b.json` is.
    """
    return f"{quote(path, safe='', errors='surrogateescape')}-{number:07d}"


def split_of(name: str, override: str | None) -> str:
    """Split that a file or folder name stands for: `val-00001.parquet` is `validation`; `train` unless it says so."""
    if override:
        return override
    words = name.lower().replace("-", "_").replace(".", "_").split("_")
    for split, names in _SPLIT_NAMES.items():
        if words[0] in names or words[-1] in names:
            return split
    return TRAIN


_SPLIT_NAMES = {
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test",),
    HELDOUT: ("heldout",),
}
