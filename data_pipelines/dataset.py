"""Reading a dataset folder: the numbers that planning needs in memory, everything else by offset.

Nothing of the size of the dataset is decoded when it is opened, so that opening takes as long for a hundred million
samples as for a hundred: token counts are mapped into memory, manifest rows are read some at a time, samples with one
ranged read each.
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.config import ReadConfig
from data_pipelines.exceptions import DataError, no_dataset
from data_pipelines.manifest import (
    FORMAT_VERSION,
    INDEX_COLUMNS,
    footer_sha256,
    index_name,
    manifest_name,
    stored_shapes,
)
from data_pipelines.media.rules import MediaShape, RenderRules
from data_pipelines.storage import PatientReader, Storage
from data_pipelines.tokenizer import TextTokenizer

VIDEO_RULES = ("video_fps", "max_frames", "video_pruning_rate")
"""Rules that count only where there are videos."""
PENDING = ".quarantine.pending"
"""Folder with new files of a dataset folder until they are moved in; `quality.quarantine` makes it and finishes."""


@dataclass(frozen=True)
class StoredSample:
    """A sample as read from its shard: record, bytes by member name, and the sizes the plan was made with."""

    record: dict[str, Any]
    media: dict[str, bytes]
    shapes: tuple[MediaShape, ...]


@dataclass(frozen=True)
class _Range:
    """Where the bytes of a sample lie: [first, first + size) of a shard, and (offset, size) of each part."""

    row: dict[str, Any]
    shard: str
    first: int
    size: int
    parts: list[tuple[int, int]]


class _RowGroup:
    """Some manifest rows. Values are taken one by one: a sliced table's `to_pylist` costs ten times as much."""

    def __init__(self, table: pa.Table) -> None:
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        media = columns.pop("media")
        self._columns = columns
        self._media_ends = media.offsets.to_numpy()
        self._media = {field.name: media.values.field(field.name) for field in media.type.value_type}

    def row(self, place: int) -> dict[str, Any]:
        spots = range(*self._media_ends[place : place + 2].tolist())
        media = [{name: values[i].as_py() for name, values in self._media.items()} for i in spots]
        return {**{name: values[place].as_py() for name, values in self._columns.items()}, "media": media}


class Dataset:
    """One split of a dataset folder. Safe to pickle into a worker process.

    Attributes:
        folder: Path or URL of the folder.
        name: Name in `dataset.json`.
        manifest_sha256: Hash of the split's manifest.
        identity: Hash of all that `dataset.json` says of the split, hashes of its files among it.
        mean_bytes: Mean size of a sample in its shard.
    """

    _ROW_GROUPS_KEPT = 32

    def __init__(self, folder: str, split: str, info: Mapping[str, Any], read: ReadConfig) -> None:
        self.folder, self.split = folder, split
        entry = info["splits"][split]
        _refuse_paths(folder, [split, *(shard["name"] for shard in entry["shards"])])
        self.name: str = info["name"]
        self.manifest_sha256: str = entry["manifest_sha256"]
        self.identity = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
        self.mean_bytes = sum(shard["bytes"] for shard in entry["shards"]) / entry["samples"]
        self._entry = entry
        self._storage = Storage(folder)
        self._reader = PatientReader(read, self._storage)
        self._check_files()
        self._load()

    @classmethod
    def open(
        cls,
        path: object,
        split: str,
        *,
        rules: RenderRules | None = None,
        tokenizer: TextTokenizer | None = None,
        read: ReadConfig | None = None,
    ) -> "Dataset":
        """Open a split, and refuse one that was counted with other rules than the run's.

        Args:
            path: Dataset folder, or an fsspec URL of one.
            split: Name of the split.
            rules: The run's rules; not compared when None.
            tokenizer: The run's tokenizer; not compared when None.
            read: Time-outs.

        Raises:
            DataError: No dataset there, another format version, no such split, a shard missing or of the wrong size, a
                manifest missing or changed, or token counts made with another tokenizer, template or tile rule.
        """
        folder = str(path)
        info = read_info(folder, read)
        if split not in info["splits"]:
            raise DataError(
                f"{folder} has no split {split!r}; it has {', '.join(sorted(info['splits']))}; "
                "`nemovl data import ... --heldout 0.1` makes a split `heldout`"
            )
        differences = _differences(info, rules, tokenizer)
        _refuse(folder, {name: text for name, text in differences.items() if name not in VIDEO_RULES})
        dataset = cls(folder, split, info, read or ReadConfig())
        if differences and dataset.has_videos:
            dataset.close()
            _refuse(folder, differences)
        return dataset

    @functools.cached_property
    def has_videos(self) -> bool:
        """Whether any sample has a video, by the largest value of a column that the manifest's footer tells."""
        metadata = self._opened()[0].metadata
        columns = range(metadata.num_columns)
        kind = next(i for i in columns if metadata.schema.column(i).path == "media.list.element.kind")
        for group in range(metadata.num_row_groups):
            found = metadata.row_group(group).column(kind).statistics
            if found is None or (found.num_values and (not found.has_min_max or found.max == "video")):
                return True
        return False

    def __len__(self) -> int:
        return self._entry["samples"]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("folder", "split", "name", "manifest_sha256", "identity", "mean_bytes", "_entry", "_storage", "_reader")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _load(self) -> None:
        self._manifest: tuple[pq.ParquetFile, np.ndarray] | None = None
        self._row_group = functools.lru_cache(maxsize=self._ROW_GROUPS_KEPT)(self._read_row_group)

    @functools.cached_property
    def _index(self) -> np.ndarray:
        """[columns, samples] int32; workers, which build what is planned, never ask for it."""
        local = self._storage.local(index_name(self.split))
        if local is not None:
            return np.load(local, mmap_mode="r")
        name = index_name(self.split)
        return np.load(io.BytesIO(self._reader.call(f"{self.folder}/{name}", lambda: self._storage.read(name))))

    @property
    def lengths(self) -> np.ndarray:
        """[samples] int32, total tokens of each sample at the rules' full tile and frame budget."""
        return self._index[INDEX_COLUMNS.index("total_tokens")]

    @property
    def text_tokens(self) -> np.ndarray:
        """[samples] int32, the part of `lengths` that is not visual features."""
        return self._index[INDEX_COLUMNS.index("text_tokens")]

    @property
    def least_tokens(self) -> np.ndarray:
        """[samples] int32, total tokens of each sample at the smallest budget."""
        return self._index[INDEX_COLUMNS.index("least_tokens")]

    def _check_files(self) -> None:
        # The manifest says where every sample lies and what its bytes hash to, so nothing holds unless it does. Its
        # pages carry checksums of their own; the footer that names them, and the counts, are hashed here.
        shards = {shard["name"]: shard["bytes"] for shard in self._entry["shards"]}
        names = {"manifest": manifest_name(self.split), "index": index_name(self.split)}
        sizes = self._reader.call(self.folder, lambda: self._storage.sizes([*names.values(), *shards]))
        pending = self._storage.local(f"{PENDING}/dataset.json")
        if pending is not None and os.path.exists(pending):
            raise DataError(
                f"{self.folder}: setting samples aside was cut short; to finish it: nemovl data quarantine list "
                f"{self.folder}"
            )
        for kind, name in names.items():
            place = f"{self.folder}/{name}"
            if sizes[name] is None:
                raise DataError(f"{place} is missing; copy or write the dataset again")
            digest = self._reader.call(place, functools.partial(self._digest, kind, name))
            if digest != self._entry[f"{kind}_check_sha256"]:
                raise DataError(
                    f"{place} is not the file that dataset.json describes (SHA-256 differs); copy or write the dataset "
                    "again"
                )
        for name, expected in shards.items():
            if sizes[name] != expected:
                found = "missing" if sizes[name] is None else f"{sizes[name]} bytes long"
                raise DataError(
                    f"{self.folder}/{name} is {found}, expected {expected} bytes; copy or write the dataset again"
                )

    def _digest(self, kind: str, name: str) -> str:
        with self._storage.open(name) as file:
            return footer_sha256(file) if kind == "manifest" else hashlib.file_digest(file, "sha256").hexdigest()

    def row(self, index: int) -> dict[str, Any]:
        """Manifest row of a sample."""
        group, place = self._place(index)
        return self._row_group(group).row(place)

    def key(self, index: int) -> str:
        """Record id of a sample."""
        return self.row(index)["key"]

    def shard_name(self, number: int) -> str:
        """File name of a shard."""
        return self._entry["shards"][number]["name"]

    def shapes(self, index: int) -> tuple[MediaShape, ...]:
        """Sizes of a sample's media, in record order."""
        return stored_shapes(self.row(index))

    def read(self, index: int) -> StoredSample:
        """Read one sample's JSON and media.

        Raises:
            DataError: Bytes missing or not those that were written, or storage that does not answer.
        """
        place = self._range(self.row(index))
        return self._sample(place, self._read_patiently(place))

    def read_many(self, indices: Sequence[int]) -> list[StoredSample | DataError]:
        """Read several samples, together where storage allows it; one that cannot be read is the error of `read`.

        Whatever goes wrong with the whole is tried again sample by sample, so that only what is bad is lost.
        """
        try:
            places = [self._range(self.row(index)) for index in indices]
            what = f"{len(places)} samples of {self.folder}"
            ranges = [(place.shard, place.first, place.size) for place in places]
            pieces: list[bytes | None] = [
                *self._reader.call(what, lambda: self._storage.read_ranges(ranges), attempts=1)
            ]
        except DataError:
            return [self._read_or_error(index) for index in indices]
        return [self._read_or_error(i, p, d) for i, p, d in zip(indices, places, pieces, strict=True)]

    def _read_or_error(
        self, index: int, place: "_Range | None" = None, data: bytes | None = None
    ) -> StoredSample | DataError:
        try:
            place = place or self._range(self.row(index))
            return self._sample(place, self._read_patiently(place) if data is None else data)
        except DataError as error:
            return error

    def _read_patiently(self, place: "_Range") -> bytes:
        what = f"sample {place.row['key']!r} in {self.folder}/{place.shard}"
        return self._reader.call(what, lambda: self._storage.read_range(place.shard, place.first, place.size))

    def _range(self, row: dict[str, Any]) -> "_Range":
        """JSON and media of a sample lie side by side in its shard: they are one read."""
        parts = [(row["json_offset"], row["json_size"]), *((m["offset"], m["size"]) for m in row["media"])]
        first = min(offset for offset, _ in parts)
        size = max(offset + length for offset, length in parts) - first
        return _Range(row, self.shard_name(row["shard"]), first, size, parts)

    def _sample(self, place: "_Range", data: bytes) -> StoredSample:
        view, row = memoryview(data), place.row
        pieces = [bytes(view[offset - place.first :][:length]) for offset, length in place.parts]
        sha = hashlib.sha256()
        for piece in pieces:
            sha.update(piece)
        if sha.hexdigest() != row["sha256"]:
            raise DataError(f"sample {row['key']!r} in {place.shard} is damaged: hash differs")
        media = {medium["member"]: piece for medium, piece in zip(row["media"], pieces[1:], strict=True)}
        return StoredSample(json.loads(pieces[0]), media, stored_shapes(row))

    def _place(self, index: int) -> tuple[int, int]:
        """Row group of a sample, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        _, starts = self._opened()
        group = int(np.searchsorted(starts, index, side="right")) - 1
        return group, index - int(starts[group])

    def _opened(self) -> tuple[pq.ParquetFile, np.ndarray]:
        if self._manifest is None:
            self._manifest = self._reader.call(self._manifest_path, self._open_manifest)
        return self._manifest

    @property
    def _manifest_path(self) -> str:
        return f"{self.folder}/{manifest_name(self.split)}"

    def _open_manifest(self) -> tuple[pq.ParquetFile, np.ndarray]:
        """The manifest, and the first row of each of its row groups."""
        file = pq.ParquetFile(self._storage.open(manifest_name(self.split)), page_checksum_verification=True)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return file, np.cumsum([0, *sizes])[:-1]

    def _read_row_group(self, group: int) -> "_RowGroup":
        assert self._manifest is not None
        opened = [self._manifest]
        self._manifest = None

        def read() -> tuple[tuple[pq.ParquetFile, np.ndarray], _RowGroup]:
            # A read that was given up may still hold the file: another attempt opens its own.
            manifest = opened.pop() if opened else self._open_manifest()
            return manifest, _RowGroup(manifest[0].read_row_group(group, use_threads=False))

        self._manifest, rows = self._reader.call(self._manifest_path, read)
        return rows

    def close(self) -> None:
        """Close the open files."""
        if self._manifest is not None:
            self._manifest[0].close(force=True)
            self._manifest = None
        self._reader.close()
        self._storage.close()


def read_info(folder: object, read: ReadConfig | None = None) -> dict[str, Any]:
    """Content of `dataset.json` of a folder, given as path or URL, read with the time-outs of `read`.

    Raises:
        DataError: Missing, not JSON, or of another format version.
    """
    path, storage = f"{folder}/dataset.json", Storage(str(folder))
    try:
        data = PatientReader(read or ReadConfig(), storage).call(path, lambda: storage.read("dataset.json"))
    except DataError as error:
        place = storage.local("")
        # The disk answered that the file is not there, so it may be asked about the folder.
        if place is not None and "FileNotFoundError" in str(error):
            raise no_dataset(folder, exists=os.path.isdir(place)) from error
        raise DataError(f"no dataset at {folder}: {error}") from error
    try:
        info = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    version = info.get("format_version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}; write the dataset again"
        )
    return info


def _refuse_paths(folder: str, names: list[Any]) -> None:
    """A name with a path in it could point anywhere on the reader's disk."""
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or PurePosixPath(name).name != name:
            raise DataError(
                f"{folder}/dataset.json names the file {name!r}; expected a plain file name in the dataset's own "
                "folder: copy or write the dataset again"
            )


def _differences(info: Mapping[str, Any], rules: RenderRules | None, tokenizer: TextTokenizer | None) -> dict[str, str]:
    """What a folder was counted with that a run has otherwise: name of the rule, and words for both values."""
    found = {}
    if tokenizer is not None and tokenizer.digest() != info["tokenizer_sha256"]:
        found["tokenizer"] = f"the tokenizer (the run's is {tokenizer.path})"
    if rules is not None:
        # A folder that says nothing of pruning was written before it could be asked for.
        stored, wanted = {"video_pruning_rate": 0.0, **info["rules"]}, asdict(rules)
        found |= {k: f"{k} ({stored.get(k)!r}, the run has {v!r})" for k, v in wanted.items() if stored.get(k) != v}
    return found


def _refuse(folder: str, differences: Mapping[str, str]) -> None:
    if differences:
        raise DataError(
            f"{folder} was counted with other rules: {'; '.join(differences.values())}. Set the run's data.* to match, "
            "or write the dataset again with the run's values"
        )
