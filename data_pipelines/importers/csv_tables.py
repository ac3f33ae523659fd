"""Rows of comma-, semicolon- and tab-separated tables, cut into units where a row ends.

A quoted field may go on over lines, so not every line ends a row.
"""

import csv
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipelines.exceptions import DataError
from data_pipelines.importers.json_ranges import MAX_RECORD_BYTES, UNIT_BYTES, UNIT_ROWS, Range
from data_pipelines.importers.rows import Rejected, Row, Unit, position_of, split_of
from data_pipelines.importers.tables import root_of, source_files

CSV_SUFFIXES = (".csv", ".tsv")
# Bytes that are not UTF-8 become lone surrogates, so that one bad row does not end the table.
_QUOTED = re.compile(b'"[^"]*"')
_HEADER_BYTES = 2**20
_NOT_UTF8 = re.compile("[\ud800-\udfff]")


class _Lines:
    """Lines of a table from one byte to another, as the csv module wants them; knows how far it is."""

    def __init__(self, file: BinaryIO, start: int, stop: int | None) -> None:
        self.file, self.at, self.stop = file, start, stop
        file.seek(start)

    def __iter__(self) -> Iterator[str]:
        while self.stop is None or self.at < self.stop:
            line = self.file.readline(MAX_RECORD_BYTES + 1)
            if len(line) > MAX_RECORD_BYTES:
                raise csv.Error(f"a line is longer than the {MAX_RECORD_BYTES} bytes that are read")
            if not line:
                return
            text = line.decode("utf-8-sig" if self.at == 0 else "utf-8", errors="surrogateescape")
            self.at += len(line)
            yield text


@dataclass(frozen=True)
class CsvReader:
    """Tables with a header line.

    Attributes:
        names: Only files of these names; all tables when empty.
    """

    names: tuple[str, ...] = ()

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """Ranges of at most 2048 rows."""
        units = []
        for path in source_files(source, CSV_SUFFIXES, roots, self.names):
            name = path.relative_to(root_of(source)).as_posix()
            units += [Unit(split_of(path.stem, split), name, r.start, r.stop, r.first) for r in _ranges(path)]
        return units

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Rows as texts by the names of the header line."""
        path = root_of(source) / unit.path
        number = unit.first - 1
        with path.open("rb") as file:
            names = _header(path, file)[0]
            try:
                for number, fields in enumerate(_table(path, _Lines(file, unit.start, unit.stop)), unit.first):
                    where = f"{unit.path}:{number + 2}"  # the header is row 1, as in a spreadsheet
                    if len(fields) != len(names):
                        text = f"has {len(fields)} fields where the header line has {len(names)}"
                        yield Rejected(where, "", "read", text)
                    elif any(not text.isascii() and _NOT_UTF8.search(text) for text in fields):
                        yield Rejected(where, "", "read", "is not UTF-8; save the table as UTF-8")
                    else:
                        values = dict(zip(names, fields, strict=True))
                        yield Row(where, position_of(unit.path, number), values, {}, path.parent)
            except csv.Error as error:
                text = f"the table cannot be read on from here: {error}"
                yield Rejected(f"{unit.path}:{number + 3}", "", "read", text)


def _table(path: Path, lines: _Lines) -> Iterator[list[str]]:
    """Rows that are not blank.

    Raises:
        csv.Error: A quote is not closed, or a field is too long.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    return (fields for fields in csv.reader(lines, delimiter=_delimiter(path), strict=True) if fields)


@functools.lru_cache(maxsize=1024)
def _delimiter(path: Path) -> str:
    """What separates the header line's names; where commas are decimal, spreadsheets save `.csv` with semicolons."""
    with path.open("rb") as file:
        head = _QUOTED.sub(b"", file.readline(_HEADER_BYTES))
    return max(",;\t", key=lambda mark: head.count(mark.encode()))


def _header(path: Path, file: BinaryIO) -> tuple[list[str], int]:
    """Names of the columns, and the byte behind them."""
    lines = _Lines(file, 0, None)
    try:
        names = next(_table(path, lines), [])
    except csv.Error as error:
        raise DataError(f"{path} has no header line: {error}") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has two columns {twice[0]!r}; give every column a name of its own")
    return names, lines.at


def _ranges(path: Path) -> list[Range]:
    with path.open("rb") as file:
        begin = _header(path, file)[1]
        lines = _Lines(file, begin, None)
        table = _table(path, lines)
        ranges: list[Range] = []
        first = count = 0
        try:
            for _ in table:
                count += 1
                if count == UNIT_ROWS or lines.at - begin > UNIT_BYTES:
                    ranges.append(Range(begin, lines.at, first))
                    begin, first, count = lines.at, first + count, 0
        except csv.Error:
            count = 1  # whoever reads the rest says what is wrong with it
    size = path.stat().st_size
    if count:
        ranges.append(Range(begin, size, first))
    return ranges
