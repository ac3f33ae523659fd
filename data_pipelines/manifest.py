"""One manifest row per sample: all that planning needs to know without opening a shard."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.exceptions import DataError
from data_pipelines.fit import least_tokens
from data_pipelines.media import image, video
from data_pipelines.media.rules import MediaShape, RenderRules, lay_out
from data_pipelines.schema import IGNORE_LABEL, MediaItem, media_items
from data_pipelines.template import encode_record
from data_pipelines.tokenizer import TextTokenizer

_MEDIA_TYPE = pa.struct(
    [
        ("member", pa.string()),
        ("kind", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("frames", pa.int32()),
        ("tiles", pa.int32()),
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("media", pa.list_(_MEDIA_TYPE)),
        ("tiles", pa.int32()),
        ("text_tokens", pa.int32()),
        ("supervised_tokens", pa.int32()),
        ("total_tokens", pa.int32()),
        ("least_tokens", pa.int32()),
        ("sha256", pa.string()),
    ]
)
"""`text_tokens` counts everything but the visual features, `least_tokens` everything under the smallest tile and frame
budget; `sha256` covers the JSON and then each medium."""

FORMAT_VERSION = 2
ROW_GROUP = 2048
"""Most rows that are decoded to look at one: a few milliseconds and half a megabyte."""

INDEX_COLUMNS = ("total_tokens", "text_tokens", "least_tokens")
"""Columns that planning reads of all rows at once."""


def manifest_name(split: str) -> str:
    """File of a split's manifest."""
    return f"{split}.parquet"


def index_name(split: str) -> str:
    """File of a split's token counts: [columns, rows] int32, `INDEX_COLUMNS` of the manifest."""
    return f"{split}.npy"


def seal_manifest(folder: Path, split: str) -> dict[str, str]:
    """Make the index of a finished manifest and hash both, for the split's entry in `dataset.json`.

    The manifest has row groups of about `ROW_GROUP` rows, which are read as a whole, and page checksums.
    """
    path, index = folder / manifest_name(split), folder / index_name(split)
    table = pq.read_table(path, columns=list(INDEX_COLUMNS))
    with index.open("wb") as file:
        np.save(file, np.stack([table[name].to_numpy().astype(np.int32) for name in INDEX_COLUMNS]))
    for written in (path, index):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    with path.open("rb") as file:
        footer = footer_sha256(file)
    return {
        "manifest_sha256": file_sha256(path),
        "manifest_check_sha256": footer,
        "index_check_sha256": file_sha256(index),
    }


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def footer_sha256(file: io.BufferedIOBase) -> str:
    """SHA-256 of a parquet file's footer, which says where every page lies and how long it is.

    The last eight bytes of the file are the footer's length and `PAR1` (Apache Parquet format, file layout).
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 8))
    tail = file.read(8)
    length = min(int.from_bytes(tail[:4], "little"), max(0, end - 8))
    file.seek(end - 8 - length)
    return hashlib.sha256(file.read(length) + tail).hexdigest()


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """The one way a record is written as JSON: sorted keys, UTF-8, no spaces.

    Raises:
        DataError: It holds a value that JSON has no form for.
    """
    try:
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"record {record['id']!r} cannot be written as JSON: {error}") from error
    return text.encode()


def describe(
    record: Mapping[str, Any], media: Mapping[str, bytes], rules: RenderRules, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Manifest row of one valid record, without its place in a shard.

    Sizes come from the media themselves: an image's header is always read, a video's metadata are taken from the record
    and read from the file only where incomplete.

    Raises:
        DataError: Media missing or unused, unreadable header, or a record that the template refuses.
    """
    items = list(media_items(record))
    _check_members(record["id"], items, media)
    sha = hashlib.sha256(record_bytes(record))
    rows, shapes, layouts = [], [], []
    for item in items:
        data = media[item.member]
        sha.update(data)
        try:
            shape = media_shape(item, data)
        except DataError as error:
            raise DataError(f"record {record['id']!r}, {item.kind} {item.member!r}: {error}") from error
        layout = lay_out(shape, rules, max_tiles=rules.max_tiles, max_frames=rules.max_frames)
        shapes.append(shape)
        layouts.append(layout)
        rows.append({"member": item.member, "tiles": layout.tiles, **asdict(shape)})
    encoded = encode_record(record, layouts, tokenizer, tokens_per_tile=rules.tokens_per_tile)
    tiles = len(encoded.tile_start)
    total = len(encoded.input_ids)
    text = total - int(encoded.tile_tokens.sum())
    return {
        "key": record["id"],
        "media": rows,
        "tiles": tiles,
        "text_tokens": text,
        "supervised_tokens": int((encoded.labels != IGNORE_LABEL).sum()),
        "total_tokens": total,
        "least_tokens": least_tokens(shapes, text, total, rules, tokenizer),
        "sha256": sha.hexdigest(),
    }


def _check_members(key: str, items: list[MediaItem], media: Mapping[str, bytes]) -> None:
    named = [item.member for item in items]
    if len(set(named)) < len(named):
        raise DataError(f"record {key!r}: a medium is used twice in {named}; store it under two names")
    if set(named) != set(media):
        raise DataError(f"record {key!r}: messages name the media {sorted(named)}, but {sorted(media)} are given")


def media_shape(item: MediaItem, data: bytes) -> MediaShape:
    """Size of one medium: from an image's header, from a video's metadata or, where these lack something, its file.

    Raises:
        DataError: The header cannot be read, or no frame can be chosen by the rate and count given.
    """
    if item.kind == "image":
        width, height = image.image_size(data)
        return MediaShape("image", width, height)
    names = ("video_width", "video_height", "video_fps", "video_num_frames")
    if any(item.metadata.get(name) is None for name in names):
        return video.probe(data)
    width, height, fps, frames = (item.metadata[name] for name in names)
    video.check_rate(float(fps), int(frames))
    return MediaShape("video", int(width), int(height), float(fps), int(frames))


def stored_shapes(row: Mapping[str, Any]) -> tuple[MediaShape, ...]:
    """Media sizes of a manifest row, in record order."""
    return tuple(MediaShape(m["kind"], m["width"], m["height"], m["fps"], m["frames"]) for m in row["media"])
