"""Samples set aside: out of the manifest, so out of every plan, and back again without a trace.

    FOLDER/SPLIT.parquet              rows that are planned
    FOLDER/SPLIT.quarantine.parquet   rows set aside; their bytes stay in the shards
    FOLDER/quarantine.jsonl           why, one line each
    FOLDER/rejected.jsonl             rows of the source that were never imported (from `nemovl data import`)

A manifest's hash is part of a run's plan, so a run that is under way refuses to continue after samples were set aside or
restored; restoring gives the very bytes, and with them the plan, that were there before.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.exceptions import DataError
from data_pipelines.manifest import MANIFEST_SCHEMA
from data_pipelines.shards import file_sha256, read_info, write_info, write_synced

REASONS = "quarantine.jsonl"
REJECTED = "rejected.jsonl"
_PENDING = ".quarantine.pending"
_GROUP_ROWS = 2**16
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
    planned, aside = _tables(folder, split)
    lines = _lines(folder)
    known = set(aside["key"].to_pylist())
    wanted = [key for key in reasons if key not in known]
    if not wanted:
        return 0
    mask = pc.is_in(planned["key"], value_set=pa.array(wanted, pa.string()))
    taken = planned.filter(mask)
    missing = sorted(set(wanted) - set(taken["key"].to_pylist()))
    if missing:
        raise DataError(f"{folder} has no sample {missing[0]!r} in split {split!r}")
    if len(taken) == len(planned):
        raise DataError(f"every sample of split {split!r} would be set aside; repair the source and import again")
    lines += [{"split": split, "key": key, "reason": reasons[key]} for key in wanted]
    _write(folder, split, planned.filter(pc.invert(mask)), pa.concat_tables([aside, taken]), lines)
    return len(taken)


def restore(folder: Path, split: str, keys: Sequence[str] | None = None) -> int:
    """Put samples back where they were; all of the split when `keys` is None.

    Returns:
        Number of samples put back.

    Raises:
        DataError: An id that is not set aside.
    """
    planned, aside = _tables(folder, split)
    wanted = aside["key"].to_pylist() if keys is None else list(keys)
    if missing := sorted(set(wanted) - set(aside["key"].to_pylist())):
        raise DataError(f"sample {missing[0]!r} of split {split!r} is not set aside; see: nemovl data quarantine list {folder}")
    if not wanted:
        return 0
    mask = pc.is_in(aside["key"], value_set=pa.array(wanted, pa.string()))
    lines = [line for line in _lines(folder) if not (line["split"] == split and line["key"] in wanted)]
    whole = pa.concat_tables([planned, aside.filter(mask)])
    _write(folder, split, whole, aside.filter(pc.invert(mask)), lines)
    return len(set(wanted))


def listing(folder: Path) -> list[dict[str, Any]]:
    """Samples set aside and rows never imported: `kind` is `set aside` or `not imported`."""
    _finish(folder)
    read_info(folder)
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


def _lines(folder: Path) -> list[dict[str, Any]]:
    return _read_lines(folder / REASONS)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _tables(folder: Path, split: str) -> tuple[pa.Table, pa.Table]:
    _finish(folder)
    info = read_info(folder)
    if split not in info["splits"]:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(sorted(info['splits']))}")
    aside = folder / f"{split}.quarantine.parquet"
    empty = MANIFEST_SCHEMA.empty_table()
    return pq.read_table(folder / f"{split}.parquet"), pq.read_table(aside) if aside.exists() else empty


def _write(folder: Path, split: str, planned: pa.Table, aside: pa.Table, lines: list[dict[str, Any]]) -> None:
    """Write the new files beside the old and move them in; the move is finished by the next call if it is cut short."""
    work = folder / f"{_PENDING}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    # The order in which samples were written, whatever was taken out and put back since.
    planned = planned.sort_by([("shard", "ascending"), ("json_offset", "ascending")])
    manifest = work / f"{split}.parquet"
    pq.write_table(planned.cast(MANIFEST_SCHEMA), manifest, compression="zstd", row_group_size=_GROUP_ROWS)
    pq.write_table(aside.cast(MANIFEST_SCHEMA), work / f"{split}.quarantine.parquet", compression="zstd")
    write_synced(work / REASONS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    info = read_info(folder)
    entry = info["splits"][split]
    entry["samples"] = len(planned)
    entry.update({column: int(pc.sum(planned[column]).as_py()) for column in _SUMS})
    entry["manifest_sha256"] = file_sha256(manifest)
    write_info(work, info)
    work.rename(folder / _PENDING)
    _finish(folder)


def _finish(folder: Path) -> None:
    pending = folder / _PENDING
    if pending.exists():
        for path in sorted(pending.iterdir()):
            os.replace(path, folder / path.name)
        with suppress(FileNotFoundError):
            pending.rmdir()
