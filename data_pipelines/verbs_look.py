"""The `nemovl data` verbs that look at dataset folders: `validate`, `stats`, `show`, `quarantine`."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from data_pipelines.arguments import Subparsers, add_json, check_dataset, check_positive
from data_pipelines.exceptions import DataError

_SHOWN = 50
_PAGE_PROBLEMS = 2000


def add_validate(verbs: Subparsers) -> None:
    """`validate`."""
    parser = verbs.add_parser("validate", help="check every sample of a dataset folder")
    parser.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    parser.add_argument("--fast", action="store_true", help="hashes, records and headers only; decode nothing")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--seq-length", type=int, help="also name samples that fit into no pack of so many tokens")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the dataset folder's own)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    parser.add_argument("--quarantine", action="store_true", help="set samples with errors aside")
    add_json(parser)
    parser.set_defaults(run=_run_validate)


def _run_validate(args: argparse.Namespace) -> int:
    check_positive(args, "workers", "seq_length")
    check_dataset(args.folder)
    from data_pipelines.quality.validate import validate

    report = validate(
        args.folder,
        tokenizer=args.tokenizer,
        split=args.split,
        seq_length=args.seq_length,
        fast=args.fast,
        workers=args.workers,
    )
    if args.html is not None:
        from data_pipelines.show import templates, write_html

        write_html(args.html, templates().get_template("validate.html").render(report=report, limit=_PAGE_PROBLEMS))
    errors = [problem for problem in report.problems if problem.severity == "error"]
    aside = _set_aside(args.folder, errors) if args.quarantine else 0
    if args.json:
        print(json.dumps({**report.as_json(), "set_aside": aside}, indent=1))
        return int(len(errors) > aside)
    for problem in report.problems[:_SHOWN]:
        place = f"{problem.split}/{problem.key}" if problem.key else problem.split
        file = f" ({problem.file})" if problem.file else ""
        print(f"{problem.severity}: {place}{file}: {problem.check}: {problem.reason}\n    {problem.fix}")
    if len(report.problems) > _SHOWN:
        print(f"... and {len(report.problems) - _SHOWN} more: --json or --html FILE lists all")
    note = "" if report.lengths_checked or report.fast else "; token counts not checked: add --tokenizer"
    print(
        f"{report.samples} samples in {report.seconds:.1f} s: {len(errors)} errors, {report.count('warning')} "
        f"warnings{note}"
    )
    if aside:
        print(f"set aside {aside} samples; back with: nemovl data quarantine restore {args.folder}")
    if args.html is not None:
        print(f"wrote {args.html}")
    if not errors:
        print(f"next: nemovl data show {args.folder}")
    return int(len(errors) > aside)


def _set_aside(folder: Path, errors: list[Any]) -> int:
    from data_pipelines.quality.quarantine import set_aside

    count = 0
    for split in {problem.split for problem in errors}:
        reasons = {p.key: f"{p.check}: {p.reason}" for p in errors if p.split == split and p.row >= 0}
        count += set_aside(folder, split, reasons) if reasons else 0
    return count


def add_stats(verbs: Subparsers) -> None:
    """`stats`."""
    parser = verbs.add_parser("stats", help="tokens, tiles, lengths and modalities of dataset folders")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="dataset folder")
    add_json(parser)
    parser.set_defaults(run=_run_stats)


def _run_stats(args: argparse.Namespace) -> int:
    from data_pipelines.quality.stats import folder_stats, format_stats

    for folder in args.folders:
        check_dataset(folder)
    found = [folder_stats(folder) for folder in args.folders]
    print(json.dumps(found, indent=1) if args.json else "\n\n".join(format_stats(stats) for stats in found))
    return 0


def add_show(verbs: Subparsers) -> None:
    """`show`."""
    parser = verbs.add_parser(
        "show",
        help="what the model sees of a sample or a pack",
        description="Tokens coloured by their role in the loss, boundaries, weights, tiles and frames: of one sample, "
        "of a pack of some dataset folders, or of a pack of a run (--config).",
    )
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="dataset folder; several for a pack")
    parser.add_argument("--split", help="split (default: train)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sample", type=int, metavar="N", help="row of the manifest (default: 0)")
    what.add_argument("--key", help="id of the sample")
    what.add_argument("--pack", type=int, metavar="N", help="number of the pack")
    parser.add_argument("--seq-length", type=int, default=16384, help="tokens of a pack (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the order of packs (default: %(default)s)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a run's resolved config.yaml: its sources, length and loss weights"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the dataset folder's own)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    add_json(parser)
    parser.set_defaults(run=_run_show)


def _run_show(args: argparse.Namespace) -> int:
    check_positive(args, "seq_length")
    if not args.folders and args.config is None:
        raise DataError("name a dataset folder, or a run's config: nemovl data show DIR, or --config FILE --pack N")
    if args.pack is None and (len(args.folders) != 1 or args.config is not None):
        raise DataError("a sample is of one dataset folder; add --pack N to see a pack of several, or of a config")
    for folder in args.folders:
        check_dataset(folder)
    from data_pipelines.showing import pack_view, sample_view

    if args.pack is None:
        view = sample_view(
            args.folders[0], split=args.split or "train", row=args.sample, key=args.key, tokenizer=args.tokenizer
        )
    else:
        view = pack_view(
            args.folders,
            args.pack,
            split=args.split,
            seq_length=args.seq_length,
            seed=args.seed,
            config=args.config,
            tokenizer=args.tokenizer,
        )
    if args.html is not None:
        from data_pipelines.show import write_page

        write_page(view, args.html)
        print(json.dumps({"html": str(args.html)}) if args.json else f"wrote {args.html}")
    elif args.json:
        print(json.dumps(view.as_json(), indent=1))
    else:
        from rich.console import Console

        from data_pipelines.show import terminal_text

        Console(soft_wrap=True).print(terminal_text(view), highlight=False)
    return 0


def add_quarantine(verbs: Subparsers) -> None:
    """`quarantine`."""
    parser = verbs.add_parser("quarantine", help="list samples that are left out, set some aside, put them back")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, text in (
        ("list", "samples set aside and rows that were not imported, with reasons"),
        ("add", "set samples aside: they leave the manifest, their bytes stay"),
        ("restore", "put samples back"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
        if name != "list":
            action.add_argument("keys", nargs="*", metavar="KEY", help="id of a sample (restore: default all)")
            action.add_argument("--split", default="train", help="split (default: %(default)s)")
            action.add_argument("--key", action="append", default=[], help="the same, for an id that starts with -")
        if name == "add":
            action.add_argument("--reason", default="set aside by hand", help="why")
        add_json(action)
        action.set_defaults(run=_run_quarantine, action=name)


def _run_quarantine(args: argparse.Namespace) -> int:
    check_dataset(args.folder)
    from data_pipelines.quality import quarantine

    if args.action == "list":
        lines = quarantine.listing(args.folder)
        if args.json:
            print(json.dumps(lines, indent=1))
            return 0
        for line in lines:
            print(f"{line['kind']}: {line['split']}/{line['key'] or line['where']}: {line['reason']}")
        print(f"{len(lines)} left out")
        return 0
    keys = [*args.keys, *args.key]
    if args.action == "add":
        if not keys:
            raise DataError(
                f"name the samples to set aside: nemovl data quarantine add {args.folder} KEY ...; their ids are in "
                f"`nemovl data validate {args.folder}`, which with --quarantine sets those with errors aside itself"
            )
        count = quarantine.set_aside(args.folder, args.split, dict.fromkeys(keys, args.reason))
    else:
        count = quarantine.restore(args.folder, args.split, keys or None)
    verb = "set aside" if args.action == "add" else "restored"
    print(json.dumps({args.action: count}) if args.json else f"{verb} {count} samples of {args.folder}")
    return 0
