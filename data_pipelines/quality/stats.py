"""What a dataset holds, from its manifests alone."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.dataset import Dataset, read_info

_BAR = 28
MODALITIES = ("text", "one image", "several images", "video")


def folder_stats(folder: Path) -> dict[str, Any]:
    """Statistics of every split of a dataset folder.

    Returns:
        `folder`, `name`, `rules` and `splits`: for each its samples, tokens (`total`, `visual`, `text`, `supervised`,
        `supervised_share`), `modalities` (samples and tokens of each), histograms `lengths` (upper bound in tokens,
        powers of two) and `tiles` (tiles of a sample), `longest`, and media counts.

    Raises:
        DataError: No dataset folder there, or one that is not complete.
    """
    info = read_info(folder)
    return {
        "folder": str(folder),
        "name": info["name"],
        "rules": info["rules"],
        "splits": {split: _split_stats(folder, split) for split in info["splits"]},
    }


def _split_stats(folder: Path, split: str) -> dict[str, Any]:
    Dataset.open(folder, split).close()  # refuses what is not complete
    columns = ["key", "media", "tiles", "text_tokens", "supervised_tokens", "total_tokens"]
    modalities: dict[str, Counter[str]] = {name: Counter() for name in MODALITIES}
    totals: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    tiles: Counter[int] = Counter()
    media: Counter[str] = Counter()
    longest = (0, "")
    with pq.ParquetFile(folder / f"{split}.parquet") as file:
        for batch in file.iter_batches(2**14, columns=columns):
            kinds = pc.list_flatten(batch["media"]).field("kind").to_pylist()
            media.update(kinds)
            for name in ("text_tokens", "supervised_tokens", "total_tokens", "tiles"):
                totals[name] += pc.sum(batch[name]).as_py() or 0
            for row in batch.select(["key", "media", "tiles", "total_tokens"]).to_pylist():
                count = row["total_tokens"]
                lengths[1 << (count - 1).bit_length()] += 1
                tiles[row["tiles"]] += 1
                longest = max(longest, (count, row["key"]))
                modalities[_modality([m["kind"] for m in row["media"]])].update(samples=1, tokens=count)
                totals["samples"] += 1
    total = totals["total_tokens"]
    return {
        "samples": totals["samples"],
        "tokens": {
            "total": total,
            "visual": total - totals["text_tokens"],
            "text": totals["text_tokens"],
            "supervised": totals["supervised_tokens"],
            "supervised_share": round(totals["supervised_tokens"] / max(total, 1), 4),
        },
        "images": media["image"],
        "videos": media["video"],
        "modalities": {name: dict(counts) for name, counts in modalities.items() if counts},
        "lengths": dict(sorted(lengths.items())),
        "tiles": dict(sorted(tiles.items())),
        "longest": {"key": longest[1], "tokens": longest[0]},
    }


def _modality(kinds: Sequence[str]) -> str:
    if "video" in kinds:
        return "video"
    return MODALITIES[min(len(kinds), 2)]


def format_stats(stats: dict[str, Any]) -> str:
    """The statistics as lines for a terminal."""
    lines = []
    for split, part in stats["splits"].items():
        tokens = part["tokens"]
        lines += [
            f"{stats['name']} / {split}: {part['samples']} samples, {part['images']} images, {part['videos']} videos",
            f"  tokens {tokens['total']}: {tokens['visual']} visual, {tokens['text']} text, {tokens['supervised']} "
            f"supervised ({100 * tokens['supervised_share']:.1f}%); longest {part['longest']['tokens']} "
            f"({part['longest']['key']})",
        ]
        for name, counts in part["modalities"].items():
            lines.append(f"  {name:<15}{counts['samples']:>9} samples{counts['tokens']:>13} tokens")
        lines += _histogram("tokens up to", part["lengths"])
        lines += _histogram("tiles", part["tiles"])
    return "\n".join(lines)


def _histogram(title: str, counts: dict[int, int]) -> list[str]:
    most = max(counts.values(), default=1)
    return [f"  {title}"] + [
        f"  {value:>12}{count:>9}  {'#' * max(1, round(_BAR * count / most))}" for value, count in counts.items()
    ]
