"""`nemovl simulate`: a stage or a schedule on paper, with failures, requeues and every sample accounted for."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from nemovl_train.config.app import split_recipe
from nemovl_train.config.compose import compose_run, compose_schedule, compose_stage, recipe_kind
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import UserError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.schedule.simulate import StageRecord, Weather, simulate

_COLUMNS = f"{'stage':<32}{'steps':>8}{'samples':>12}{'tokens':>10}{'planned':>10}{'fill':>7}{'passes':>8}"
_TIMES = f"{'crashes':>9}{'limits':>8}{'repeated':>10}{'hours':>9}{'alone':>9}"


def add_simulate_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `simulate` to the `nemovl` command."""
    usual = Weather()
    parser = subparsers.add_parser("simulate", help="a schedule on paper: data, steps, failures, time to finish")
    parser.add_argument("overrides", nargs="*", metavar="recipe=NAME key=value", help="as for nemovl schedule")
    numbers = {
        "--node-mtbf-hours": ("node_mtbf_hours", "mean time between failures of a node, 0 for none"),
        "--time-limit-hours": ("time_limit_hours", "time limit of a job, 0 for none"),
        "--lead-seconds": ("lead_seconds", "before the limit, when a job is asked to save"),
        "--queue-hours": ("queue_hours", "from a requeue to the next start"),
        "--start-minutes": ("start_minutes", "from a start to its first step"),
    }
    for flag, (name, text) in numbers.items():
        parser.add_argument(flag, type=float, default=getattr(usual, name), help=f"{text} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of the failures (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=1, help="take one step in so many (default: %(default)s, all)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    weather = Weather(
        node_mtbf_hours=args.node_mtbf_hours,
        time_limit_hours=args.time_limit_hours,
        lead_seconds=args.lead_seconds,
        queue_hours=args.queue_hours,
        start_minutes=args.start_minutes,
        seed=args.seed,
    )
    _refuse(weather, args.scale)
    began = time.perf_counter()
    records = simulate(_stages(args.overrides), weather, scale=args.scale)
    print(f"simulated in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(json.dumps(as_document(records, weather), indent=1) if args.json else as_text(records))
    return ExitCode.FAILED if any(record.problems for record in records) else ExitCode.OK


def _refuse(weather: Weather, scale: int) -> None:
    if scale < 1:
        raise UserError(f"--scale {scale}: at least 1")
    for name, value in asdict(weather).items():
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: 0 or more")
    usable = weather.time_limit_hours * 3600 - weather.lead_seconds - 60 * weather.start_minutes
    if weather.time_limit_hours and usable <= 0:
        raise UserError(
            f"--time-limit-hours {weather.time_limit_hours:g}: the start and the lead leave no time for a step; "
            "raise it, or lower --lead-seconds or --start-minutes"
        )


def _stages(overrides: list[str]) -> list[RunConfig]:
    recipe, changes = split_recipe(overrides)
    if recipe_kind(recipe) == "run":
        return [compose_run(recipe, changes)]
    schedule = compose_schedule(recipe, changes)
    return [compose_stage(schedule, stage) for stage in schedule.stages]


def as_document(records: list[StageRecord], weather: Weather) -> dict[str, Any]:
    """Records and sums as plain values."""
    return {
        "ok": not any(record.problems for record in records),
        "weather": asdict(weather),
        "stages": [asdict(record) for record in records],
        "hours": round(sum(record.hours for record in records), 2),
        "ideal_hours": round(sum(record.ideal_hours for record in records), 2),
    }


def as_text(records: list[StageRecord]) -> str:
    """A table, then what did not add up."""
    lines = [f"{_COLUMNS}{_TIMES}"]
    lines += [
        f"{r.name:<32}{r.steps:>8,}{r.samples:>12,}{_billions(r.tokens):>10}{_billions(r.planned_tokens):>10}"
        f"{r.fill:>7.1%}{r.passes:>8.3f}{r.failures:>9}{r.limits:>8}{r.repeated_steps:>10,}{r.hours:>9.1f}"
        f"{r.ideal_hours:>9.1f}"
        for r in records
    ]
    hours, ideal = sum(r.hours for r in records), sum(r.ideal_hours for r in records)
    lines.append(
        f"{sum(r.packs for r in records):,} packs on {max(r.ranks for r in records)} ranks: {hours:.1f} hours, "
        f"{ideal:.1f} of them steps that count ({ideal / hours:.0%})"
    )
    problems = [f"{r.name}: {problem}" for r in records for problem in r.problems]
    return "\n".join([*lines, *(problems or ["every pack was taken exactly once, no sample before its turn"])])


def _billions(tokens: int) -> str:
    return f"{tokens / 1e9:.2f}B" if tokens >= 10**8 else f"{tokens / 1e6:.2f}M"
