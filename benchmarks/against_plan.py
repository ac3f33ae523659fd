"""Measured runs against plans of the same runs: memory, step time, and what did not fit.

    python benchmarks/against_plan.py benchmarks/results/2026-11-25_train_units_1xh100.json
    python benchmarks/against_plan.py UNITS.json STAGES.json --out O.json

Reads what `train.py` and `stage_steps.py` wrote; needs no GPU and no torch. A peak that includes what an earlier case
had left behind (`before_gib`) is compared without it. Exit code 1 where memory is off by more than 10%, time by more
than 20%, or a run that failed for memory was planned to fit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from train_cases import SECTIONS, Case, document_lengths

from nemovl_train.config.schema import DataConfig, RunConfig
from nemovl_train.config.schema import PrecisionConfig as Precision
from nemovl_train.config.schema import TrainerConfig as Trainer
from nemovl_train.plan.hardware import GIB, GPU_TYPES
from nemovl_train.plan.load import Grid, PackLoad
from nemovl_train.plan.memory import memory
from nemovl_train.plan.timing import step_time

MEMORY_BOUND, TIME_BOUND = 0.10, 0.20
GPU = GPU_TYPES["h100_80gb"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [row for path in args.results for row in compare(json.loads(path.read_text()))]
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))
    bad = [row["case"] for row in rows if not within(row)]
    print(f"beyond the bounds: {', '.join(bad) or 'none'}")
    sys.exit(bool(bad))


def within(row: dict[str, Any]) -> bool:
    """Whether a plan was close enough."""
    if "fits" in row:
        return not row["fits"]
    return abs(row["memory_error"]) <= MEMORY_BOUND and abs(row["time_error"]) <= TIME_BOUND


def compare(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a result file that say what a plan says too."""
    rows = []
    for row in result["rows"]:
        if "stage" in row and "memory_error" in row:
            rows.append(
                errors(
                    row["stage"], row["allocated_gib"], row["planned_gib"], row["step_seconds"], row["planned_seconds"]
                )
            )
        elif row.get("options", {}).get("kind") == "train":
            rows.append(compare_case(row))
    return rows


def compare_case(row: dict[str, Any]) -> dict[str, Any]:
    """A case of `train.py`."""
    case = case_of(row["options"])
    config = config_of(case)
    ranks = case.parallel.tp * case.parallel.cp
    grid = Grid(
        tp=case.parallel.tp,
        cp=case.parallel.cp,
        dp=row["processes"] // ranks,
        sequence_parallel=case.parallel.sequence_parallel,
    )
    loads = [load_of(case, config, number) for number in range(case.packs)]
    planned = max(memory(config, grid, load).total for load in loads) / GIB
    if "failed" in row:
        room = (GPU.memory_bytes - GPU.outside_pool_bytes) / GIB
        return {"case": row["case"], "failed": row["failed"], "planned_gib": round(planned, 1), "fits": planned <= room}
    seconds = statistics.mean(step_time(config, grid, load, GPU, packs=case.micro_batches).total for load in loads)
    return errors(row["case"], row["peak_gib"] - row["before_gib"], planned, row["median_step_seconds"], seconds)


def errors(case: str, gib: float, planned_gib: float, seconds: float, planned_seconds: float) -> dict[str, Any]:
    """One line of the table."""
    return {
        "case": case,
        "measured_gib": round(gib, 1),
        "planned_gib": round(planned_gib, 1),
        "memory_error": round(planned_gib / gib - 1, 3),
        "measured_seconds": round(seconds, 3),
        "planned_seconds": round(planned_seconds, 3),
        "time_error": round(planned_seconds / seconds - 1, 3),
    }


def case_of(options: dict[str, Any]) -> Case:
    """The case that a result names; options that it is too old to have are at their defaults."""
    known = {item.name for item in fields(Case)}
    values = {key: value for key, value in options.items() if key in known} | {"train": tuple(options["train"])}
    for section, kind in SECTIONS.items():
        names = {item.name for item in fields(kind)}
        plain = (str, int, float, bool, type(None))
        values[section] = kind(**{k: v for k, v in options[section].items() if k in names and isinstance(v, plain)})
    return Case(**values)


def config_of(case: Case) -> RunConfig:
    """What `train.py` runs, as a config that plans read."""
    return RunConfig(
        model=case.model(small=False),
        data=DataConfig(seq_length=case.seq_length),
        parallel=case.parallel,
        recompute=case.recompute,
        optim=case.optim,
        precision=Precision(params="bf16"),
        trainer=Trainer(train=case.train),
    )


def load_of(case: Case, config: RunConfig, number: int) -> PackLoad:
    """A pack of the first data parallel rank: visual tokens first in each document, every other one a target."""
    lengths = document_lengths(case, 0, number)
    per_tile = config.model.tokens_per_tile
    tiles = sum(int(length * case.visual / per_tile) for length in lengths) if case.vision_layers else 0
    return PackLoad(
        seq_length=case.seq_length,
        documents=tuple(lengths),
        samples=len(lengths),
        tiles=tiles,
        head_tokens=sum(lengths) - tiles * per_tile - len(lengths),
    )


if __name__ == "__main__":
    main()
