"""A dataset folder as plain files that other tools read, and that an import reads back.

    OUT/SPLIT.jsonl                      layout `tars`: messages as in Nemotron-VLM-Dataset-v2, one record a line
    OUT/media/SPLIT-00000.tar            its media, webdataset shards: ROW.MEMBER
    OUT/SPLIT/metadata.jsonl             layout `folder`: the same lines
    OUT/SPLIT/media/ROW.MEMBER           its media

Tools and calls are written in OpenAI's shape. Samples that are set aside are not in the manifest and are not written.
"""

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import webdataset

from data_pipelines.dataset import Dataset, StoredSample, read_info
from data_pipelines.exceptions import DataError
from data_pipelines.schema import MEDIA_KINDS, content_items

LAYOUTS = ("tars", "folder")
_SHARD_BYTES = 2**28


class _Media(Protocol):
    """Where the media of a split go."""

    def add(self, row: str, media: Mapping[str, bytes]) -> None: ...

    def close(self) -> None: ...


class _Tars:
    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split, self.shards, self.written = folder, split, 0, 0
        self.tar: webdataset.TarWriter | None = None

    def add(self, row: str, media: Mapping[str, bytes]) -> None:
        if self.tar is None or self.written >= _SHARD_BYTES:
            self.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            name = self.folder / f"{self.split}-{self.shards:05d}.tar"
            self.tar = webdataset.TarWriter(str(name), user="", group="", mtime=0, encoder=False)
            self.shards, self.written = self.shards + 1, 0
        self.written += self.tar.write({"__key__": f"{self.split}/{row}", **media})

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
            self.tar = None


class _Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, row: str, media: Mapping[str, bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for member, data in media.items():
            (self.folder / f"{row}.{member}").write_bytes(data)

    def close(self) -> None: ...


def export(folder: Path, out: Path, *, layout: str = "tars", split: str | None = None) -> dict[str, Any]:
    """Write a dataset folder as plain files.

    Args:
        folder: Dataset folder.
        out: Folder to make; it appears when it is complete.
        layout: One of `LAYOUTS`.
        split: Only this split.

    Returns:
        `out`, `layout`, and `samples` and `media` of each split.

    Raises:
        DataError: `out` exists, no such split, a sample cannot be read (named), or the disk refuses.
    """
    assert layout in LAYOUTS, layout
    if out.exists():
        raise DataError(f"{out} exists already; choose another --out, or remove it to export again")
    splits = list(read_info(folder)["splits"])
    if split is not None and split not in splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(sorted(splits))}")
    work = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        counts = {name: _write_split(folder, name, work, layout) for name in ([split] if split else splits)}
        work.rename(out)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise DataError(f"cannot write {out}: {reason}; free or change the place and type it again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"out": str(out), "layout": layout, "splits": counts}


def _write_split(folder: Path, split: str, work: Path, layout: str) -> dict[str, int]:
    media: _Media
    if layout == "tars":
        table, media, prefix = work / f"{split}.jsonl", _Tars(work / "media", split), f"{split}/"
    else:
        table, media, prefix = work / split / "metadata.jsonl", _Files(work / split / "media"), "media/"
    table.parent.mkdir(exist_ok=True)
    samples = count = 0
    with table.open("w", encoding="utf-8") as lines:
        for row, stored in _stored(folder, split):
            lines.write(json.dumps(_line(stored, f"{prefix}{row}"), ensure_ascii=False) + "\n")
            if stored.media:
                media.add(row, stored.media)
            samples, count = samples + 1, count + len(stored.media)
    media.close()
    return {"samples": samples, "media": count}


def _stored(folder: Path, split: str) -> Iterator[tuple[str, StoredSample]]:
    dataset = Dataset.open(folder, split)
    try:
        for row in range(len(dataset)):
            yield f"{row:08d}", dataset.read(row)
    except DataError as error:
        raise DataError(f"{error}; set it aside first: nemovl data validate {folder} --quarantine") from error
    finally:
        dataset.close()


def _line(stored: StoredSample, name: str) -> dict[str, Any]:
    """The record with names that lead to its media; each keeps the name that the dataset's own source gave it."""
    messages = []
    for message in stored.record["messages"]:
        items = [
            {**item, item["type"]: f"{name}.{item[item['type']]}"} if item["type"] in MEDIA_KINDS else dict(item)
            for item in content_items(message)
        ]
        calls = [{"type": "function", "function": dict(call)} for call in message.get("tool_calls", ())]
        messages.append({"role": message["role"], "content": items, **({"tool_calls": calls} if calls else {})})
    tools = [{"type": "function", "function": json.loads(text)} for text in stored.record.get("tools", ())]
    return {"id": stored.record["id"], **({"tools": tools} if tools else {}), "messages": messages}
