"""`nemovl eval`. Heavy modules are imported when the verb runs, so that --help is instant."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nemovl_train.config.nearest import did_you_mean
from nemovl_train.evaluation.metrics import METRICS
from nemovl_train.evaluation.sets import BENCHMARKS, HeldoutSet
from nemovl_train.exceptions import UserError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.inference.cli import add_decoding_arguments, decoding


def add_eval_command(subparsers: Any) -> None:
    """Register `eval` on the parser of the `nemovl` command.

    Args:
        subparsers: What `argparse.ArgumentParser.add_subparsers` returned.
    """
    parser = subparsers.add_parser("eval", help="score an exported model on held-out sets and benchmarks")
    parser.add_argument("folder", type=Path, help="exported Hugging Face folder, such as runs/tiny/hf")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR[:METRIC,...]",
        help=f"dataset folder and its metrics (default: exact_match); may be repeated; metrics: {', '.join(METRICS)}",
    )
    parser.add_argument("--split", default="heldout", help="split of the dataset folders (default: %(default)s)")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help=f"local copy of a public benchmark ({', '.join(BENCHMARKS)}); may be repeated",
    )
    parser.add_argument("--max-samples", type=int, help="most questions of each set (default: all)")
    parser.add_argument("--seq-length", type=int, default=16384, help="pack length for the loss (default: %(default)s)")
    parser.add_argument("--think", action="store_true", help="turn reasoning on; its trace is not scored")
    add_decoding_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results, single answers included")
    parser.add_argument("--report", type=Path, metavar="RUN_DIR", help="show the results in the report of this run")
    parser.add_argument("--label", help="what the report calls them (default: the name of the folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    sets, benchmarks = _asked_for(args)
    from nemovl_train.checkpoint.files import replace_text
    from nemovl_train.console import setup_logging
    from nemovl_train.evaluation.exported import evaluate

    setup_logging()
    options = {"think": args.think, "max_samples": args.max_samples, "seq_length": args.seq_length}
    results = evaluate(args.folder, sets=sets, benchmarks=benchmarks, decoding=decoding(args), **options)
    label = args.label or args.folder.resolve().name
    for path in (args.out, args.report and args.report / "evaluations" / f"{label}.json"):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(results, indent=1))
    print(json.dumps(results) if args.json else _table(results))
    if args.report and not args.json:
        print(f"shown as {label!r} by: nemovl report {args.report}")
    return ExitCode.OK


def _asked_for(args: argparse.Namespace) -> tuple[list[HeldoutSet], list[tuple[str, Path]]]:
    """Sets and benchmarks, or every problem of the command line at once."""
    problems = [f"{args.folder}: there is no such folder"] if not args.folder.is_dir() else []
    if args.report and not args.report.is_dir():
        problems.append(f"--report {args.report}: there is no such run folder")
    if args.label is not None and (Path(args.label).name != args.label or args.label in ("", ".", "..")):
        problems.append(f"--label {args.label!r}: it names a file; give a plain word")
    if args.max_samples is not None and args.max_samples < 1:
        problems.append(f"--max-samples {args.max_samples}: at least 1")
    if not args.data and not args.benchmark:
        problems.append("nothing to evaluate: give --data DIR, or --benchmark NAME=DIR")
    sets = []
    for text in args.data:
        path, _, listed = text.partition(":")
        names = tuple(listed.split(",")) if listed else ("exact_match",)
        problems += [
            f"--data {text}: no metric {n!r}{did_you_mean(n, list(METRICS))}" for n in names if n not in METRICS
        ]
        if not (Path(path) / "dataset.json").is_file():
            problems.append(f"--data {text}: {path} is no dataset folder (see `nemovl data import`)")
        sets.append(HeldoutSet(Path(path).name, path, names, args.split))
    benchmarks = []
    for text in args.benchmark:
        name, _, path = text.partition("=")
        if name not in BENCHMARKS:
            problems.append(f"--benchmark {text}: no benchmark {name!r}{did_you_mean(name, BENCHMARKS)}")
        elif not Path(path).is_dir():
            problems.append(f"--benchmark {text}: there is no folder {path!r}; write NAME=DIR")
        benchmarks.append((name, Path(path)))
    named = [heldout.name for heldout in sets] + [name for name, _ in benchmarks]
    problems += [
        f"two sets are named {n!r}; evaluate them one by one" for n in sorted({n for n in named if named.count(n) > 1})
    ]
    if problems:
        raise UserError("\n".join(problems))
    return sets, benchmarks


def _table(results: dict[str, Any]) -> str:
    lines = [f"{'set':<24} {'metric':<18} {'score':>8} {'loss':>8} {'samples':>8}"]
    for name, row in results["sources"].items():
        loss = "" if row.get("loss") is None else f"{row['loss']:.4f}"
        for metric, value in row["metrics"].items():
            score = "-" if value is None else f"{100 * value:.1f}%"
            lines.append(f"{name:<24} {metric:<18} {score:>8} {loss:>8} {row['samples']:>8}")
        if row["left_out"]:
            lines.append(f"{'':<24} {row['left_out']} samples could not be asked; the log says why")
    return "\n".join(lines)
