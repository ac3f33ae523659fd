"""A dataset folder: webdataset tar shards, one parquet manifest per split, and `dataset.json`.

Written once, deterministically and atomically; read by offset. The manifest holds all that planning needs, so no media
is opened before its pack is built.

    FOLDER/dataset.json        format version, rules, tokenizer digest, counts, shard and manifest hashes
    FOLDER/SPLIT.parquet       one row a sample, in writing order
    FOLDER/SPLIT-00000.tar     members ROW.json, ROW.MEMBER (webdataset groups them by ROW)
"""

import errno
import hashlib
import json
import os
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from data_pipelines.exceptions import DataError
from data_pipelines.manifest import MANIFEST_SCHEMA, describe, record_bytes, stored_shapes
from data_pipelines.media.rules import MediaShape, RenderRules
from data_pipelines.schema import validate_record
from data_pipelines.template import TEMPLATES
from data_pipelines.tokenizer import TextTokenizer

FORMAT_VERSION = 1

Sample = tuple[dict[str, Any], dict[str, bytes]]


def write_dataset(
    out: Path,
    splits: Mapping[str, Iterable[Sample]],
    *,
    name: str,
    tokenizer: Path,
    template: str = "nano_v2_vl",
    tile_size: int = 512,
    max_tiles: int = 12,
    use_thumbnail: bool = True,
    video_fps: float = 2.0,
    max_frames: int = 128,
    shard_mib: float = 64,
) -> Path:
    """Write a dataset folder. The same samples give the same bytes; a folder that exists is complete.

    Args:
        out: Folder to make; it must not exist. The work is done beside it and renamed at the end.
        splits: Per split, (record, {member name: bytes}) pairs, consumed once and in order.
        name: Name of the dataset, kept in `dataset.json`.
        tokenizer: Folder with `tokenizer.json`, used to count tokens.
        template: Named version of the prompt rules.
        tile_size: Side of a tile in pixels.
        max_tiles: Largest grid of one image, thumbnail not counted.
        use_thumbnail: Append the whole image as one more tile.
        video_fps: Frames sampled per second.
        max_frames: Most frames of one video.
        shard_mib: A shard is closed once it holds this many MiB.

    Returns:
        `out`.

    Raises:
        DataError: `out` exists, a record or medium cannot be used (named), an id repeats, or the disk refuses.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already; choose another folder, or remove it to write it again")
    rules = RenderRules(
        template=template,
        tile_size=tile_size,
        max_tiles=max_tiles,
        use_thumbnail=use_thumbnail,
        video_fps=float(video_fps),
        max_frames=max_frames,
    )
    if template not in TEMPLATES:
        raise DataError(f"unknown template {template!r}; choose from {', '.join(TEMPLATES)}")
    text_tokenizer = TextTokenizer(tokenizer)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counts = {
            split: SplitWriter(partial, split, rules, text_tokenizer, int(shard_mib * 2**20)).write(samples)
            for split, samples in splits.items()
        }
        write_info(partial, dataset_info(name, rules, text_tokenizer, counts))
        partial.rename(out)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise DataError(f"cannot write the dataset {out}: {reason}; free or change the place and run again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def dataset_info(
    name: str, rules: RenderRules, tokenizer: TextTokenizer, splits: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Content of `dataset.json`; `splits` holds what `SplitWriter` returned for each."""
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "rules": asdict(rules),
        "tokenizer_sha256": tokenizer.digest(),
        "rules_sha256": rules.digest(tokenizer.digest()),
        "splits": splits,
    }


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Write `dataset.json`, the same bytes for the same content."""
    write_synced(folder / "dataset.json", (json.dumps(info, indent=2, sort_keys=True) + "\n").encode())


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SplitWriter:
    """Writes the shards and the manifest of one split.

    Args:
        folder: Where to.
        split: Name of the split, with which the file names start.
        rules: Prompt and tile rules.
        tokenizer: Counts tokens.
        shard_bytes: A shard is closed once it holds as much.
        key_prefix: Put before the row number in the names of tar members.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        rules: RenderRules,
        tokenizer: TextTokenizer,
        shard_bytes: int,
        *,
        key_prefix: str = "",
    ) -> None:
        self.folder, self.split, self.rules, self.tokenizer = folder, split, rules, tokenizer
        self.shard_bytes, self.key_prefix = shard_bytes, key_prefix
        self.shards: list[dict[str, Any]] = []
        self.counts = {"samples": 0, "tiles": 0, "total_tokens": 0, "supervised_tokens": 0}

    def write(self, samples: Iterable[Sample]) -> dict[str, Any]:
        """Write samples; all must be good, and there must be some."""
        counts = self.write_described(self._described(samples, set()))
        if not counts["samples"]:
            raise DataError(f"split {self.split!r} has no samples")
        return counts

    def write_described(self, described: Iterator[tuple[dict, dict[str, bytes], dict]]) -> dict[str, Any]:
        """Write (record, media, row of `manifest.describe`) triples; returns the split's entry of `dataset.json`."""
        manifest = self.folder / f"{self.split}.parquet"
        with pq.ParquetWriter(manifest, MANIFEST_SCHEMA, compression="zstd") as writer:
            while rows := self._write_shard(described):
                writer.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
        with manifest.open("rb") as file:
            os.fsync(file.fileno())
        return {**self.counts, "manifest_sha256": file_sha256(manifest), "shards": self.shards}

    def _described(self, samples: Iterable[Sample], keys: set[str]) -> Iterator[tuple[dict, dict[str, bytes], dict]]:
        for record, media in samples:
            validate_record(record)
            if record["id"] in keys:
                raise DataError(f"split {self.split!r}: record id {record['id']!r} is used twice; ids must be unique")
            keys.add(record["id"])
            yield record, media, describe(record, media, self.rules, self.tokenizer)

    def _write_shard(self, described: Iterator[tuple[dict, dict[str, bytes], dict]]) -> list[dict]:
        """Fill one shard; returns its manifest rows, none when the samples are used up."""
        path = self.folder / f"{self.split}-{len(self.shards):05d}.tar"
        rows: list[dict] = []
        written = 0
        with path.open("wb") as file:
            with webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
                while written < self.shard_bytes and (item := next(described, None)):
                    record, media, row = item
                    members = {"json": record_bytes(record), **media}
                    written += tar.write({"__key__": f"{self.key_prefix}{self.counts['samples']:08d}", **members})
                    for key in ("tiles", "total_tokens", "supervised_tokens"):
                        self.counts[key] += row[key]
                    self.counts["samples"] += 1
                    rows.append({**row, "shard": len(self.shards)})
            file.flush()
            os.fsync(file.fileno())
        if not rows:
            path.unlink()
            return []
        _fill_offsets(path, rows)
        self.shards.append({"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
        return rows


def _fill_offsets(path: Path, rows: list[dict]) -> None:
    """Read the finished shard's headers: the offsets are what the file says, not what we think we wrote."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            samples.setdefault(key, {})[name] = member
    for row, members in zip(rows, samples.values(), strict=True):
        row["json_offset"], row["json_size"] = members["json"].offset_data, members["json"].size
        for medium in row["media"]:
            info = members[medium["member"]]
            medium["offset"], medium["size"] = info.offset_data, info.size


@dataclass(frozen=True)
class StoredSample:
    """A sample as read from its shard: record, bytes by member name, and the sizes the plan was made with."""

    record: dict[str, Any]
    media: dict[str, bytes]
    shapes: tuple[MediaShape, ...]


class Dataset:
    """One split of a dataset folder: sizes in memory, samples by offset. Safe to pickle into a worker process.

    Attributes:
        name: Name in `dataset.json`.
        manifest_sha256: Hash of the split's manifest.
        lengths: [samples] int64, total tokens of each sample at the rules' full tile and frame budget.
        text_tokens: [samples] int64, the part of `lengths` that is not visual features.
    """

    _MAX_OPEN_SHARDS = 64

    def __init__(self, folder: Path, split: str, info: Mapping[str, Any]) -> None:
        self.folder, self.split = folder, split
        _refuse_paths(folder, [split, *(shard["name"] for shard in info["splits"][split]["shards"])])
        self.name: str = info["name"]
        self.manifest_sha256: str = info["splits"][split]["manifest_sha256"]
        self._shards: list[dict[str, Any]] = info["splits"][split]["shards"]
        self._check_files()
        self._load()

    @classmethod
    def open(
        cls, path: str | Path, split: str, *, rules: RenderRules | None = None, tokenizer: TextTokenizer | None = None
    ) -> "Dataset":
        """Open a split, and refuse one that was counted with other rules than the run's.

        Args:
            path: Dataset folder.
            split: Name of the split.
            rules: The run's rules; not compared when None.
            tokenizer: The run's tokenizer; not compared when None.

        Raises:
            DataError: No dataset there, another format version, no such split, a shard missing or of the wrong size, a
                manifest missing or changed, or token counts made with another tokenizer, template or tile rule.
        """
        folder = Path(path)
        info = read_info(folder)
        if split not in info["splits"]:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(sorted(info['splits']))}")
        _check_rules(folder, info, rules, tokenizer)
        return cls(folder, split, info)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "split": self.split, "name": self.name, "_shards": self._shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _load(self) -> None:
        path = self.folder / f"{self.split}.parquet"
        self._table = pq.read_table(path, memory_map=True)
        self.lengths = self._table["total_tokens"].to_numpy().astype("int64")
        self.text_tokens = self._table["text_tokens"].to_numpy().astype("int64")
        self._files: OrderedDict[int, int] = OrderedDict()

    def _check_files(self) -> None:
        # The manifest says where every sample lies and what its bytes hash to, so nothing holds unless it does.
        manifest = self.folder / f"{self.split}.parquet"
        found = file_sha256(manifest) if manifest.is_file() else None
        if found != self.manifest_sha256:
            problem = "missing" if found is None else "not the file that dataset.json describes (SHA-256 differs)"
            raise DataError(f"{manifest} is {problem}; copy or write the dataset again")
        for shard in self._shards:
            path = self.folder / shard["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "missing" if size is None else f"{size} bytes long"
                raise DataError(f"{path} is {found}, expected {shard['bytes']} bytes; copy or write the dataset again")

    def row(self, index: int) -> dict[str, Any]:
        """Manifest row of a sample."""
        return self._table.slice(index, 1).to_pylist()[0]

    def key(self, index: int) -> str:
        """Record id of a sample."""
        return self._table["key"][index].as_py()

    def shard_name(self, number: int) -> str:
        """File name of a shard."""
        return str(self._shards[number]["name"])

    def shapes(self, index: int) -> tuple[MediaShape, ...]:
        """Sizes of a sample's media, in record order."""
        return stored_shapes(self.row(index))

    def read(self, index: int) -> StoredSample:
        """Read one sample's JSON and media.

        Raises:
            DataError: Bytes missing, or not those that were written.
        """
        row = self.row(index)
        data = self._read_at(row["shard"], row["json_offset"], row["json_size"])
        sha = hashlib.sha256(data)
        media = {}
        for medium in row["media"]:
            media[medium["member"]] = self._read_at(row["shard"], medium["offset"], medium["size"])
            sha.update(media[medium["member"]])
        if sha.hexdigest() != row["sha256"]:
            raise DataError(f"sample {row['key']!r} in {self._shards[row['shard']]['name']} is damaged: hash differs")
        return StoredSample(json.loads(data), media, stored_shapes(row))

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            if len(self._files) >= self._MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.folder / self._shards[shard]["name"], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return os.pread(self._files[shard], size, offset)

    def close(self) -> None:
        """Close the open shards."""
        while self._files:
            os.close(self._files.popitem()[1])


def read_info(folder: Path) -> dict[str, Any]:
    """Content of `dataset.json`.

    Raises:
        DataError: Missing, not JSON, or of another format version.
    """
    path = folder / "dataset.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"no dataset at {folder}: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    version = info.get("format_version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}; write the dataset again"
        )
    return info


def _refuse_paths(folder: Path, names: list[Any]) -> None:
    """A name with a path in it could point anywhere on the reader's disk."""
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise DataError(
                f"{folder / 'dataset.json'} names the file {name!r}; expected a plain file name in the dataset's own "
                "folder: copy or write the dataset again"
            )


def _check_rules(
    folder: Path, info: Mapping[str, Any], rules: RenderRules | None, tokenizer: TextTokenizer | None
) -> None:
    differences = []
    if tokenizer is not None and tokenizer.digest() != info["tokenizer_sha256"]:
        differences.append(f"the tokenizer (the run's is {tokenizer.path})")
    if rules is not None:
        stored, wanted = info["rules"], asdict(rules)
        differences += [f"{k} ({stored.get(k)!r}, the run has {v!r})" for k, v in wanted.items() if stored.get(k) != v]
    if differences:
        raise DataError(
            f"{folder} was counted with other rules: {'; '.join(differences)}. Set the run's data.* to match, or write "
            "the dataset again with the run's values"
        )
