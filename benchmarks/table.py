"""Writes the tables of measured training cases in docs/performance.md from the result files of `train.py`.

    python benchmarks/table.py            # write
    python benchmarks/table.py --check    # fail where the page is not what the files say

Nothing in these tables is typed: date, GPU, versions, command, options and numbers are the files'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- written by benchmarks/table.py -->", "<!-- end of what it wrote -->"
LAYERS, BLOCKS = 62, 32
"""Of the 12B language model and of its tower."""


def main() -> None:
    """Write the page or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text()
    wanted = with_tables(page, tables(result_files()))
    if args.check and page != wanted:
        sys.exit("docs/performance.md is not what benchmarks/results says: run python benchmarks/table.py")
    PAGE.write_text(wanted)


def result_files() -> list[Path]:
    """Results of `train.py`, newest first."""
    return sorted((ROOT / "benchmarks" / "results").glob("*_train_*.json"), reverse=True)


def with_tables(page: str, text: str) -> str:
    """The page with what stands between the marks replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def tables(files: list[Path]) -> str:
    """One section a file."""
    return "\n\n".join(_section(path) for path in files)


def _section(path: Path) -> str:
    result = json.loads(path.read_text())
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    training = [row for row in result["rows"] if row["options"]["kind"] == "train"]
    heads = [row for row in result["rows"] if row["options"]["kind"] == "head"]
    parts = [
        f"**{result['date']}, {result['device']}** ({versions}), `benchmarks/results/{path.name}`:",
        f"```bash\n{result['command']}\n```",
    ]
    parts += [_training(training)] if training else []
    parts += [_heads(heads)] if heads else []
    notes = [f"* `{row['case']}`: {row['note']}" for row in result["rows"] if "note" in row]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _training(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | program | model | layout, packs a step | recomputed | states | useful tokens/s/GPU | MFU | peak GiB "
        "| ours is |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        options = row["options"]
        cells = [f"`{row['case']}`", options.get("engine", "ours") + _form(options), _model(options), _layout(row)]
        cells += [_recompute(options), options["optim"]["states"]]
        if "failed" in row:
            lines.append(f"| {' | '.join(cells)} | {row['failed'].split('.')[0]} | | | |")
            continue
        rate = row["tokens_per_second_per_gpu"]
        # Earlier runs left memory of the case before on the GPU; it is no part of this one.
        left = row.get("before_gib", 0.0)
        peak = row["peak_gib"] - (left if left > 0.1 else 0.0)
        own = first.setdefault(row["case"], row)
        times = "" if own is row else f"{own['tokens_per_second_per_gpu'] / rate:.2f} x"
        lines.append(f"| {' | '.join(cells)} | {rate:,.0f} | {row['mfu']:.1%} | {peak:.1f} | {times} |")
    return "\n".join(lines)


def _heads(rows: list[dict[str, Any]]) -> str:
    forms = {"fused": "ours", "fused_supervised": "ours, a third of the positions supervised"}
    forms |= {"remade": "ours, logits made again in backward", "eager": "plain", "stock": "Transformer Engine's"}
    lines = ["| loss head | form | ms | GiB beside inputs and gradients |", "|---|---|---|---|"]
    for row in rows:
        for key, name in forms.items():
            if f"{key}_milliseconds" in row:
                found = f"{row[f'{key}_milliseconds']:.1f} | {row[f'{key}_extra_gib']:.2f}"
                lines.append(f"| `{row['case']}` | {name} | {found} |")
    return "\n".join(lines)


def _form(options: dict[str, Any]) -> str:
    form = options.get("form", "packed")
    return "" if form == "packed" else {"alone": ", documents alone", "padded": ", documents padded"}[form]


def _model(options: dict[str, Any]) -> str:
    width = "" if options.get("width", 1) == 1 else "half width, "
    layers = len(options["hybrid_pattern"])
    fp8 = ", FP8" if options.get("precision", {}).get("fp8", "none") != "none" else ""
    text = f"{width}{layers}{f' of {LAYERS}' if layers < LAYERS else ''} layers, {options['vocab_size']:,} rows{fp8}"
    blocks = options["vision_layers"]
    return text + (f", {blocks} of {BLOCKS} tower blocks" if blocks else "")


def _layout(row: dict[str, Any]) -> str:
    options = row["options"]
    parallel = options["parallel"]
    tp, cp = parallel["tp"], parallel["cp"]
    sp = " + SP" if parallel["sequence_parallel"] else ""
    packs = f"{options['micro_batches']} x {options['seq_length']:,}"
    return f"TP {tp}{sp} x CP {cp} x DP {row['processes'] // (tp * cp)}, {packs}"


def _recompute(options: dict[str, Any]) -> str:
    recompute = options["recompute"]
    layers = recompute["language_layers"]
    text = recompute["language"] + (f", {layers} layers" if layers and recompute["language"] == "full" else "")
    return text + (f"; tower {recompute['vision']}" if options["vision_layers"] else "")


if __name__ == "__main__":
    main()
