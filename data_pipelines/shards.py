"""A dataset folder: webdataset tar shards, one parquet manifest per split, and `dataset.json`.

Written once, deterministically and atomically; read by `data_pipelines.dataset`. The manifest holds all that planning
needs, so no media is opened before its pack is built.

    FOLDER/dataset.json        format version, rules, tokenizer digest, counts, shard and manifest hashes
    FOLDER/SPLIT.parquet       one row a sample, in writing order
    FOLDER/SPLIT.npy           the token counts of all rows, to be mapped into memory
    FOLDER/SPLIT-00000.tar     members ROW.json, ROW.MEMBER (webdataset groups them by ROW)
"""

import errno
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from data_pipelines.exceptions import DataError
from data_pipelines.manifest import (
    FORMAT_VERSION,
    MANIFEST_SCHEMA,
    ROW_GROUP,
    describe,
    file_sha256,
    manifest_name,
    record_bytes,
    seal_manifest,
)
from data_pipelines.media.rules import RenderRules
from data_pipelines.schema import validate_record
from data_pipelines.template import TEMPLATES
from data_pipelines.tokenizer import TextTokenizer

Sample = tuple[dict[str, Any], dict[str, bytes]]


def split_problem(split: str) -> str:
    """Why a name cannot be a split's, with which file names start; empty when it can."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        return ""
    return f"{split!r} is not a name for a split: letters, digits, '_' and '-', a letter or digit first, such as train"


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
    video_pruning_rate: float = 0.0,
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
        video_pruning_rate: Share of each video's visual tokens that are dropped.
        shard_mib: A shard is closed once it holds this many MiB.

    Returns:
        `out`.

    Raises:
        DataError: `out` exists, a split's name is not a plain word, a record or medium cannot be used (named), an id
            repeats, or the disk refuses.
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
        video_pruning_rate=float(video_pruning_rate),
    )
    if problems := [problem for split in splits if (problem := split_problem(split))]:
        raise DataError("; ".join(problems))
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
        manifest = self.folder / manifest_name(self.split)
        with pq.ParquetWriter(manifest, MANIFEST_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            while rows := self._write_shard(described):
                writer.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), row_group_size=ROW_GROUP)
        return {**self.counts, **seal_manifest(self.folder, self.split), "shards": self.shards}

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
