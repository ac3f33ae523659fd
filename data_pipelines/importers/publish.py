"""From finished units to a dataset folder: shards get their final names, manifests become one, ids are checked."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.exceptions import DataError
from data_pipelines.importers.work import FINAL, PART, PLACES_FILE, REJECTED_FILE, UnitResult, unit_folder
from data_pipelines.manifest import MANIFEST_SCHEMA, ROW_GROUP, seal_manifest
from data_pipelines.media.rules import RenderRules
from data_pipelines.shards import dataset_info, write_info
from data_pipelines.tokenizer import TextTokenizer

_MANIFEST = f"{PART}.parquet"
_GROUP_ROWS = 2**16
_SUMS = ("tiles", "total_tokens", "supervised_tokens")


@dataclass(frozen=True)
class Repeat:
    """A sample whose id was used before in its split.

    Attributes:
        split: Split.
        key: Id.
        where: Place of its row in the source.
        before: Place of the row that has the id.
        unit: Number of its unit.
        row: Its row in the unit's manifest.
        advice: What to do about it, put behind the message.
    """

    split: str
    key: str
    where: str
    before: str
    unit: int
    row: int
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.where}: id {self.key!r} is that of {self.before}"


def find_repeats(folder: Path, results: Sequence[UnitResult]) -> list[Repeat]:
    """Samples whose id was used before in their split, in the order of the source; nothing is changed."""
    repeats: list[Repeat] = []
    for split in dict.fromkeys(result.split for result in results):
        repeats += _repeats_of(folder, split, [r for r in results if r.split == split and r.samples])
    return repeats


def _repeats_of(folder: Path, split: str, parts: Sequence[UnitResult]) -> Iterator[Repeat]:
    tables = [pq.read_table(unit_folder(folder, part.number) / _MANIFEST, columns=["key"])["key"] for part in parts]
    keys = pa.chunked_array([chunk for table in tables for chunk in table.chunks], pa.string())
    counts = pc.value_counts(keys)
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if not len(several):
        return
    seen: dict[str, str] = {}
    for part, table in zip(parts, tables, strict=True):
        rows = pc.indices_nonzero(pc.is_in(table, value_set=several)).to_pylist()
        if not rows:
            continue
        text = (unit_folder(folder, part.number) / PLACES_FILE).read_text(encoding="utf-8")
        places = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            key = table[row].as_py()
            if key in seen:
                yield Repeat(split, key, places[row], seen[key], part.number, row)
            else:
                seen[key] = places[row]


def publish(
    folder: Path,
    out: Path,
    results: Sequence[UnitResult],
    repeats: Sequence[Repeat],
    *,
    name: str,
    rules: RenderRules,
    tokenizer: TextTokenizer,
) -> dict[str, Any]:
    """Make the dataset folder of an import whose units are all there.

    Every step may be interrupted and done again: shards are moved one by one, the folder takes its name at the end.

    Args:
        folder: Work folder.
        out: Dataset folder, which must not exist.
        results: Every unit, in order.
        repeats: What `find_repeats` found, to be left out.
        name: Name of the dataset.
        rules: Prompt and tile rules.
        tokenizer: Copied into the folder, so that it can be looked at on its own.

    Returns:
        Content of `dataset.json`.

    Raises:
        DataError: No sample at all.
    """
    final = folder / FINAL
    final.mkdir(exist_ok=True)
    splits = {}
    rejected = [line for result in results for line in _rejected_lines(folder, result)]
    for split in dict.fromkeys(result.split for result in results):
        parts = [result for result in results if result.split == split and result.samples]
        if parts:
            splits[split] = _publish_split(folder, final, split, parts, repeats)
    rejected += [_repeat_line(repeat) for repeat in repeats]
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
    folder: Path, final: Path, split: str, parts: Sequence[UnitResult], repeats: Sequence[Repeat]
) -> dict[str, Any]:
    repeated: dict[int, set[int]] = {}
    for repeat in repeats:
        repeated.setdefault(repeat.unit, set()).add(repeat.row)
    shards: list[dict[str, Any]] = []
    counts = dict.fromkeys(("samples", *_SUMS), 0)
    path = final / f"{split}.parquet"
    held: list[pa.Table] = []
    with pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for number, part in enumerate(parts):
            home = unit_folder(folder, part.number)
            table = _moved(pq.read_table(home / _MANIFEST), len(shards), repeated.get(part.number, set()))
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


def _moved(table: pa.Table, shards: int, left_out: set[int]) -> pa.Table:
    """Rows of a part as rows of the split: shard numbers go on, repeated ids are left out."""
    at = table.schema.get_field_index("shard")
    table = table.set_column(at, "shard", pc.add(table["shard"], pa.scalar(shards, pa.int32())))
    if left_out:
        table = table.filter(pa.array([row not in left_out for row in range(len(table))]))
    return table.cast(MANIFEST_SCHEMA)


def _repeat_line(repeat: Repeat) -> str:
    line = {
        "split": repeat.split,
        "where": repeat.where,
        "key": repeat.key,
        "reason": "duplicate_id",
        "message": f"id {repeat.key!r} is that of {repeat.before}{repeat.advice}",
    }
    return json.dumps(line) + "\n"
