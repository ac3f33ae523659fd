"""From finished units to a dataset folder: shards get their final names, manifests become one, ids are checked."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.exceptions import DataError
from data_pipelines.importers.work import PART, REJECTED_FILE, UnitResult, unit_folder
from data_pipelines.manifest import MANIFEST_SCHEMA, ROW_GROUP, seal_manifest
from data_pipelines.media.rules import RenderRules
from data_pipelines.shards import dataset_info, write_info
from data_pipelines.tokenizer import TextTokenizer

_MANIFEST = f"{PART}.parquet"
_GROUP_ROWS = 2**16
_SUMS = ("tiles", "total_tokens", "supervised_tokens")


def publish(
    folder: Path, out: Path, results: Sequence[UnitResult], *, name: str, rules: RenderRules, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Make the dataset folder of an import whose units are all there.

    Every step may be interrupted and done again: shards are moved one by one, the folder takes its name at the end.

    Args:
        folder: Work folder.
        out: Dataset folder, which must not exist.
        results: Every unit, in order.
        name: Name of the dataset.
        rules: Prompt and tile rules.
        tokenizer: Copied into the folder, so that it can be looked at on its own.

    Returns:
        Content of `dataset.json`.

    Raises:
        DataError: No sample at all.
    """
    final = folder / "final"
    final.mkdir(exist_ok=True)
    splits = {}
    rejected = [line for result in results for line in _rejected_lines(folder, result)]
    for split in dict.fromkeys(result.split for result in results):
        parts = [result for result in results if result.split == split and result.samples]
        if parts:
            splits[split] = _publish_split(folder, final, split, parts, rejected)
    if not splits:
        raise DataError(f"nothing of the source became a sample; the first reason: {_first(rejected)}")
    (final / REJECTED_FILE).write_text("".join(rejected), encoding="utf-8")
    shutil.copyfile(tokenizer.path, final / tokenizer.path.name)
    info = dataset_info(name, rules, tokenizer, splits)
    write_info(final, info)
    final.rename(out)
    return info


def _first(rejected: list[str]) -> str:
    if not rejected:
        return "it has no rows"
    first = json.loads(rejected[0])
    return f"{first['where']}: {first['message']}"


def _rejected_lines(folder: Path, result: UnitResult) -> Iterator[str]:
    if result.rejected:
        with (unit_folder(folder, result.number) / REJECTED_FILE).open(encoding="utf-8") as file:
            yield from file


def _publish_split(
    folder: Path, final: Path, split: str, parts: Sequence[UnitResult], rejected: list[str]
) -> dict[str, Any]:
    repeated = _repeated_rows([unit_folder(folder, part.number) / _MANIFEST for part in parts])
    rejected += [_repeat_line(split, key) for keys in repeated.values() for key in keys.values()]
    shards: list[dict[str, Any]] = []
    counts = dict.fromkeys(("samples", *_SUMS), 0)
    path = final / f"{split}.parquet"
    held: list[pa.Table] = []
    with pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for number, part in enumerate(parts):
            home = unit_folder(folder, part.number)
            table = _moved(pq.read_table(home / _MANIFEST), len(shards), repeated.get(number, {}))
            counts["samples"] += len(table)
            for column in _SUMS:
                counts[column] += int(pc.sum(table[column]).as_py() or 0)
            shards += [_place(home, final, split, len(shards) + i, s) for i, s in enumerate(part.counts["shards"])]
            held.append(table)
            if sum(map(len, held)) >= _GROUP_ROWS or number == len(parts) - 1:
                writer.write_table(pa.concat_tables(held), row_group_size=ROW_GROUP)
                held = []
    return {**counts, **seal_manifest(final, split), "shards": shards}


def _place(home: Path, final: Path, split: str, number: int, shard: dict[str, Any]) -> dict[str, Any]:
    target = final / f"{split}-{number:05d}.tar"
    if not target.exists():
        (home / shard["name"]).rename(target)
    return {**shard, "name": target.name}


def _moved(table: pa.Table, shards: int, left_out: dict[int, str]) -> pa.Table:
    """Rows of a part as rows of the split: shard numbers go on, repeated ids are left out."""
    at = table.schema.get_field_index("shard")
    table = table.set_column(at, "shard", pc.add(table["shard"], pa.scalar(shards, pa.int32())))
    if left_out:
        table = table.filter(pa.array([row not in left_out for row in range(len(table))]))
    return table.cast(MANIFEST_SCHEMA)


def _repeated_rows(manifests: Sequence[Path]) -> dict[int, dict[int, str]]:
    """Part number to row number to id, of rows whose id was used before."""
    parts = [pq.read_table(path, columns=["key"])["key"] for path in manifests]
    keys = pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
    if len(keys.unique()) == len(keys):
        return {}
    seen: set[str] = set()
    repeated: dict[int, dict[int, str]] = {}
    for number, part in enumerate(parts):
        for row, key in enumerate(part.to_pylist()):
            if key in seen:
                repeated.setdefault(number, {})[row] = key
            seen.add(key)
    return repeated


def _repeat_line(split: str, key: str) -> str:
    line = {
        "split": split,
        "where": "",
        "key": key,
        "reason": "duplicate_id",
        "message": f"id {key!r} is used before; import with --ids position if it is another sample",
    }
    return json.dumps(line) + "\n"
