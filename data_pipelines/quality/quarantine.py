"""Samples set aside: out of the manifest, so out of every plan, and back again without a trace.

    FOLDER/SPLIT.parquet              rows that are planned
    FOLDER/SPLIT.whole.parquet        the manifest as it was written, while samples are set aside
    FOLDER/quarantine.jsonl           which samples and why, one line each; their bytes stay in the shards
    FOLDER/rejected.jsonl             rows of the source that were never imported (from `nemovl data import`)

A manifest's hash is part of a run's plan, so a run that is under way refuses to continue after samples were set aside.
Restoring them brings back the very bytes, and with them the plan, that were there before.
"""

import difflib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.dataset import PENDING, read_info
from data_pipelines.exceptions import DataError
from data_pipelines.manifest import MANIFEST_SCHEMA, ROW_GROUP, seal_manifest
from data_pipelines.shards import write_info, write_synced

logger = logging.getLogger(__name__)

REASONS = "quarantine.jsonl"
REJECTED = "rejected.jsonl"
_SEARCHED = 10_000
"""Ids that a mistyped one is compared with: more would take seconds."""
_SUMS = ("tiles", "total_tokens", "supervised_tokens")


def set_aside(folder: Path, split: str, reasons: Mapping[str, str]) -> int:
    """Take samples out of a split.

    Args:
        folder: Dataset folder.
        split: Split.
        reasons: Id of each sample and why; ids that are set aside already are left as they are.

    Returns:
        Number of samples taken out.

    Raises:
        DataError: An id that the split does not have, or nothing would be left.
    """
    with _locked(folder):
        return _set_aside(folder, split, reasons)


def _set_aside(folder: Path, split: str, reasons: Mapping[str, str]) -> int:
    whole = _whole(folder, split)
    lines = _lines(folder)
    known = _keys(lines, split)
    wanted = [key for key in reasons if key not in known]
    if not wanted:
        return 0
    if missing := sorted(set(wanted) - set(whole["key"].to_pylist())):
        near = difflib.get_close_matches(missing[0], whole["key"].slice(0, _SEARCHED).to_pylist(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has ids like {whole['key'][0].as_py()!r}"
        raise DataError(f"{folder} has no sample {missing[0]!r} in split {split!r}{hint}")
    if len(known) + len(wanted) == len(whole):
        raise DataError(f"every sample of split {split!r} would be set aside; repair the source and import again")
    lines += [{"split": split, "key": key, "reason": reasons[key]} for key in wanted]
    _write(folder, split, whole, lines)
    return len(wanted)


def restore(folder: Path, split: str, keys: Sequence[str] | None = None) -> int:
    """Put samples back where they were; all of the split when `keys` is None.

    Returns:
        Number of samples put back.

    Raises:
        DataError: An id that is not set aside.
    """
    with _locked(folder):
        return _restore(folder, split, keys)


def _restore(folder: Path, split: str, keys: Sequence[str] | None) -> int:
    whole = _whole(folder, split)
    lines = _lines(folder)
    known = _keys(lines, split)
    wanted = known if keys is None else set(keys)
    if missing := sorted(wanted - known):
        raise DataError(
            f"sample {missing[0]!r} of split {split!r} is not set aside; see: nemovl data quarantine list {folder}"
        )
    if wanted:
        _write(folder, split, whole, [li for li in lines if li["split"] != split or li["key"] not in wanted])
    return len(wanted)


def listing(folder: Path) -> list[dict[str, Any]]:
    """Samples set aside and rows never imported: `kind` is `set aside` or `not imported`."""
    with _locked(folder):
        _finish(folder)
        aside = [{"kind": "set aside", "where": "", **line} for line in _lines(folder)]
    rejected = [
        {
            "kind": "not imported",
            "split": line["split"],
            "key": line["key"],
            "where": line["where"],
            "reason": f"{line['reason']}: {line['message']}",
        }
        for line in _read_lines(folder / REJECTED)
    ]
    return aside + rejected


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process changes the folder, then keep it; the folder itself is locked, to leave no file."""
    read_info(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems
            logger.warning("%s cannot be locked (%s): change it from one process at a time", folder, error.strerror)
        yield
    finally:
        os.close(handle)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return _read_lines(folder / REASONS)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _keys(lines: list[dict[str, Any]], split: str) -> set[str]:
    return {line["key"] for line in lines if line["split"] == split}


def _whole(folder: Path, split: str) -> pa.Table:
    """The manifest as it was written."""
    _finish(folder)
    info = read_info(folder)
    if split not in info["splits"]:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(sorted(info['splits']))}")
    path = _original(folder, split)
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; copy the folder again, or import the source again") from error


def _original(folder: Path, split: str) -> Path:
    kept = folder / f"{split}.whole.parquet"
    return kept if kept.exists() else folder / f"{split}.parquet"


def _write(folder: Path, split: str, whole: pa.Table, lines: list[dict[str, Any]]) -> None:
    """Write the new files beside the old and move them in; the move is finished by the next call if it is cut short."""
    work = folder / f"{PENDING}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    aside = _keys(lines, split)
    manifest = work / f"{split}.parquet"
    shutil.copyfile(_original(folder, split), work / f"{split}.whole.parquet")
    planned = whole
    if aside:
        planned = whole.filter(pc.invert(pc.is_in(whole["key"], value_set=pa.array(sorted(aside), pa.string()))))
        pq.write_table(
            planned.cast(MANIFEST_SCHEMA),
            manifest,
            compression="zstd",
            row_group_size=ROW_GROUP,
            write_page_checksum=True,
        )
    else:
        # Not written anew: the very bytes, so that the plan of a run is what it was.
        shutil.copyfile(_original(folder, split), manifest)
    write_synced(work / REASONS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    info = read_info(folder)
    entry = info["splits"][split]
    entry["samples"] = len(planned)
    entry.update({column: int(pc.sum(planned[column]).as_py()) for column in _SUMS})
    entry.update(seal_manifest(work, split))
    write_info(work, info)
    work.rename(folder / PENDING)
    _finish(folder)


def _finish(folder: Path) -> None:
    pending = folder / PENDING
    if pending.exists():
        # dataset.json last: it describes the others, and until then the old one does not fit them.
        for path in sorted(pending.iterdir(), key=lambda path: (path.name == "dataset.json", path.name)):
            os.replace(path, folder / path.name)
        with suppress(FileNotFoundError):
            pending.rmdir()
