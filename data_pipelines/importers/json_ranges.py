"""Where the records of a JSON file lie, without parsing them: so that files of any size are cut into units of work."""

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.exceptions import DataError

MAX_RECORD_BYTES = 2**26
"""Longest record that is parsed: 64 MiB, room for pictures written into the JSON."""

UNIT_ROWS = 2048
UNIT_BYTES = 2**25
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# Up to the next bracket, strings skipped as a whole; between the elements of the list a comma stops as well.
_INSIDE = re.compile(rb"(?:[^\"\[\]{}]++|" + _STRING + rb")*+([\[\]{}])", re.DOTALL)
_BETWEEN = re.compile(rb"(?:[^\"\[\]{},]++|" + _STRING + rb")*+([\[\]{},])", re.DOTALL)
_BLANK = b" \t\r\n"


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file that hold whole records, and the number of the first of them (from 0)."""

    start: int
    stop: int
    first: int


def is_list(path: Path) -> bool:
    """Whether a file holds one JSON list rather than one record a line."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip(_BLANK)
    return head.startswith(b"[")


def record_spans(data: mmap.mmap | bytes, start: int, stop: int, *, as_list: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) of each record in a range; blank lines are skipped."""
    return _element_spans(data, start, stop) if as_list else _line_spans(data, start, stop)


def _line_spans(data: mmap.mmap | bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        end = data.find(b"\n", start, stop)
        end = stop if end < 0 else end
        # A blank line is short; a long one is not copied to find out.
        if end - start > 64 or data[start:end].strip(_BLANK):
            yield start, end
        start = end + 1


def _element_spans(data: mmap.mmap | bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Elements of a list between its brackets: split at commas of depth 0."""
    depth, begin, at = 0, start, start
    while match := (_INSIDE if depth else _BETWEEN).match(data, at, stop):
        at = match.end()
        token = match[1]
        if token == b",":
            yield begin, at - 1
            begin = at
        elif token in b"[{":
            depth += 1
        else:
            depth -= 1
            if depth < 0:
                raise DataError(f"not a JSON list: bracket closed too often at byte {at - 1}")
    if depth:
        raise DataError("not a JSON list: it ends inside an element; the file may be incomplete")
    if stop - begin > 64 or data[begin:stop].strip(_BLANK):
        yield begin, stop


def unit_ranges(path: Path, *, rows: int = UNIT_ROWS, size: int = UNIT_BYTES) -> list[Range]:
    """Cut a file into ranges of at most so many records and, unless one record is longer, so many bytes.

    Raises:
        DataError: A list that is not well-formed, with the file's name.
    """
    if not path.stat().st_size:
        return []
    as_list = is_list(path)
    ranges: list[Range] = []
    data = map_file(path)
    start, stop = _inside(path, data) if as_list else (0, len(data))
    count = first = 0
    begin = end = start
    try:
        for left, right in record_spans(data, start, stop, as_list=as_list):
            if count and (count == rows or right - begin > size):
                ranges.append(Range(begin, end, first))
                begin, first, count = left, first + count, 0
            end, count = right, count + 1
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if count:
        ranges.append(Range(begin, end, first))
    return ranges


def map_file(path: Path) -> mmap.mmap:
    """Map a file that is not empty; it is unmapped when nothing refers to it any more."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _inside(path: Path, data: mmap.mmap) -> tuple[int, int]:
    """Range between the brackets of a list."""
    start = data.find(b"[") + 1
    stop = len(data)
    while data[stop - 1] in _BLANK:
        stop -= 1
    if data[stop - 1 : stop] != b"]":
        raise DataError(f"{path}: the JSON list is not closed; the file may be incomplete: copy it again")
    return start, stop - 1
