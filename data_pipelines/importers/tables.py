"""Rows of JSON and Parquet files and of folders saved by the `datasets` library."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.exceptions import DataError
from data_pipelines.importers.json_ranges import (
    MAX_RECORD_BYTES,
    UNIT_BYTES,
    UNIT_ROWS,
    is_list,
    map_file,
    record_spans,
    unit_ranges,
)
from data_pipelines.importers.parsing import parse_json
from data_pipelines.importers.rows import Rejected, Row, Unit, position_of, split_of

_BATCH_ROWS = 16
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def root_of(source: Path) -> Path:
    """Folder that a source's paths are relative to."""
    return source.parent if source.is_file() else source


def files_with(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files of a source by extension, in a fixed order; what lies in hidden folders is not the source's."""
    if source.is_file():
        return [source]
    found = (path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts))


def source_files(
    source: Path, suffixes: Sequence[str], roots: Sequence[Path] = (), names: Sequence[str] = ()
) -> list[Path]:
    """Files of a source that are read: as `files_with`, of these names if any are given, and none from elsewhere.

    Raises:
        DataError: A link that leads outside the source and the roots.
    """
    paths = [path for path in files_with(source, suffixes) if not names or path.name in names]
    if source.is_dir():  # a single file was named by the user, wherever it leads
        check_inside(paths, source, roots)
    return paths


def check_inside(paths: Iterable[Path], source: Path, roots: Sequence[Path]) -> None:
    """Refuse files and folders of a source that a link leads to from elsewhere.

    Raises:
        DataError: Naming the first.
    """
    allowed = [Path(os.path.realpath(folder)) for folder in (source, *roots)]
    real = ((path, Path(os.path.realpath(path))) for path in paths)
    outside = [(path, target) for path, target in real if not any(target.is_relative_to(root) for root in allowed)]
    if outside:
        path, target = outside[0]
        others = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        raise DataError(
            f"{path} is a link to {target}, outside the source folder{others}; if it is yours, copy it into the "
            f"folder; an import also takes --media-root {target.parent}"
        )


@dataclass(frozen=True)
class JsonReader:
    """JSON lists and JSON lines.

    Attributes:
        names: Only files of these names; all JSON files when empty.
    """

    names: tuple[str, ...] = ()

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """Ranges of at most 2048 records."""
        units = []
        for path in source_files(source, JSON_SUFFIXES, roots, self.names):
            name = path.relative_to(root_of(source)).as_posix()
            # A metadata file is named alike everywhere; its folder may say which split it is.
            told = path.parent.name if self.names and path.parent != root_of(source) else path.stem
            units += [Unit(split_of(told, split), name, r.start, r.stop, r.first) for r in unit_ranges(path)]
        return units

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Records of a range."""
        path = root_of(source) / unit.path
        data, as_list = map_file(path), is_list(path)
        for number, (start, stop) in enumerate(record_spans(data, unit.start, unit.stop, as_list=as_list), unit.first):
            where = f"{unit.path}:{number + 1}"
            if stop - start > MAX_RECORD_BYTES:
                text = f"record of {stop - start} bytes is longer than the {MAX_RECORD_BYTES} that are read"
                yield Rejected(where, "", "read", text)
                continue
            try:
                values = parse_json(data[start:stop])
                if not isinstance(values, dict):
                    raise ValueError(f"expected an object, got {type(values).__name__}")
            except ValueError as error:
                yield Rejected(where, "", "read", f"not a JSON record: {error}")
                continue
            yield Row(where, position_of(unit.path, number), values, {}, path.parent)


class ParquetReader:
    """Parquet files, as on the Hugging Face hub."""

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """Runs of row groups of at most 2048 rows, or one larger group."""
        units = []
        for path in source_files(source, (".parquet",), roots):
            name = path.relative_to(root_of(source)).as_posix()
            told = split_of(path.stem.split("-")[0], split)
            if told == "train" and path.parent != root_of(source):
                told = split_of(path.parent.name, split)
            try:
                meta = pq.read_metadata(path)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path} is not a complete Parquet file: {error}; copy it again") from error
            units += _group_units(name, told, meta)
        return units

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Rows of some row groups, a few at a time: pictures in them may be large."""
        path = root_of(source) / unit.path
        number = unit.first
        try:
            with pq.ParquetFile(path) as file:
                names = _class_names(file.schema_arrow)
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(range(unit.start, unit.stop))):
                    for values in batch.to_pylist():
                        position = position_of(unit.path, number)
                        yield Row(f"{unit.path}:{number + 1}", position, _named(values, names), {}, path.parent)
                        number += 1
        except (OSError, pa.ArrowException) as error:
            yield Rejected(f"{unit.path}:{number + 1}", "", "read", f"the file cannot be read on from here: {error}")


def _group_units(name: str, split: str, meta: pq.FileMetaData) -> list[Unit]:
    units = []
    first = begin = rows = size = 0
    for group in range(meta.num_row_groups):
        info = meta.row_group(group)
        if rows and (rows + info.num_rows > UNIT_ROWS or size + info.total_byte_size > 8 * UNIT_BYTES):
            units.append(Unit(split, name, begin, group, first))
            begin, first, rows, size = group, first + rows, 0, 0
        rows += info.num_rows
        size += info.total_byte_size
    if rows:
        units.append(Unit(split, name, begin, meta.num_row_groups, first))
    return units


class SavedReader:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """Ranges of rows of each split."""
        units = []
        for name, rows in self._parts(source, roots):
            told = split_of(name or source.name, split)
            starts = range(0, rows, UNIT_ROWS)
            units += [Unit(told, name, start, min(start + UNIT_ROWS, rows), start) for start in starts]
        return units

    def _parts(self, source: Path, roots: Sequence[Path]) -> list[tuple[str, int]]:
        names = [""]
        if (source / "dataset_dict.json").exists():
            names = sorted(path.parent.name for path in source.glob("*/state.json"))
        check_inside((path for name in names for path in (source / name).iterdir()), source, roots)
        return [(name, len(_saved(source / name))) for name in names]

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Rows as stored: pictures stay encoded."""
        table = _saved(source / unit.path)
        names = _class_names(table.features.arrow_schema)
        raw = table.with_format("arrow")
        label = unit.path or source.name
        for start in range(unit.start, unit.stop, _BATCH_ROWS):
            batch = raw[start : min(start + _BATCH_ROWS, unit.stop)]
            for number, values in enumerate(batch.to_pylist(), start):
                position = position_of(label, number)
                yield Row(f"{label}:{number + 1}", position, _named(values, names), {}, source / unit.path)


def _saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.Dataset.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{folder} is not a complete folder of datasets' save_to_disk: {error}") from error


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the classes of each label column, which a Hugging Face table stores as numbers."""
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (ValueError, KeyError, TypeError):  # metadata of a version or a tool unknown to this one
        return {}
    return {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _named(values: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    for column, classes in names.items():
        number = values.get(column)
        if isinstance(number, int) and 0 <= number < len(classes):
            values[column] = classes[number]
    return values
