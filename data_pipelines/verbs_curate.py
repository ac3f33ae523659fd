"""The `nemovl data` verbs that thin datasets out and hand them on: `dedup`, `export`."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.arguments import Subparsers, add_json, check_dataset, check_positive
from data_pipelines.exceptions import DataError

if TYPE_CHECKING:
    from data_pipelines.quality.dedup import Duplicate

_SHOWN = 50
_EXPORT_LAYOUTS = ("tars", "folder")


def add_dedup(verbs: Subparsers) -> None:
    """`dedup`."""
    parser = verbs.add_parser(
        "dedup",
        help="find samples that are there twice, exactly or nearly, and set them aside",
        description="Compare all samples of some dataset folders. Exact duplicates have the same messages and media; "
        "near ones have images that look alike (perceptual hash) and texts that are alike (MinHash), questions and "
        "answers each. The first is kept: folders in the order they are named, and in a folder held-out splits before "
        "train, so that what leaks from them leaves the training data.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="dataset folder")
    parser.add_argument(
        "--text-similarity", type=float, default=0.8, help="least Jaccard similarity, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--image-bits", type=int, default=4, help="most bits of 64 in which images differ (default: %(default)s)"
    )
    parser.add_argument("--exact", action="store_true", help="only exact duplicates")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--quarantine", action="store_true", help="set the duplicates aside: no plan has them any more")
    add_json(parser)
    parser.set_defaults(run=_run_dedup)


def _run_dedup(args: argparse.Namespace) -> int:
    check_positive(args, "workers")
    if not 0.5 <= args.text_similarity <= 1 or not 0 <= args.image_bits <= 16:
        raise DataError(
            f"--text-similarity {args.text_similarity} must be between 0.5 and 1, --image-bits {args.image_bits} "
            "between 0 and 16: below and above that, what is found is not alike"
        )
    for folder in args.folders:
        check_dataset(folder)
    from data_pipelines.quality.dedup import find_duplicates

    report = find_duplicates(
        args.folders,
        text_similarity=args.text_similarity,
        image_bits=args.image_bits,
        exact_only=args.exact,
        workers=args.workers,
    )
    aside = _set_aside(report.duplicates) if args.quarantine else 0
    if args.json:
        print(json.dumps({**report.as_json(), "set_aside": aside}, indent=1))
        return 0
    for duplicate in report.duplicates[:_SHOWN]:
        print(f"{duplicate.kind}: {duplicate.folder} {duplicate.split}/{duplicate.key}: {duplicate.reason()}")
    if len(report.duplicates) > _SHOWN:
        print(f"... and {len(report.duplicates) - _SHOWN} more: --json lists all")
    unread = f", {report.unreadable} could not be read: nemovl data validate DIR" if report.unreadable else ""
    print(
        f"{report.samples} samples: {report.count('exact')} exact and {report.count('near')} near duplicates, "
        f"{report.across_splits()} of them of another split or folder{unread}"
    )
    names = " ".join(map(str, args.folders))
    if aside:
        print(f"set aside {aside} samples; back with: nemovl data quarantine restore DIR")
    elif report.duplicates:
        print(f"to leave them out: nemovl data dedup {names} --quarantine")
    return 0


def _set_aside(duplicates: "list[Duplicate]") -> int:
    from data_pipelines.quality.quarantine import set_aside

    places: dict[tuple[str, str], dict[str, str]] = {}
    for duplicate in duplicates:
        places.setdefault((duplicate.folder, duplicate.split), {})[duplicate.key] = duplicate.reason()
    return sum(set_aside(Path(folder), split, reasons) for (folder, split), reasons in places.items())


def add_export(verbs: Subparsers) -> None:
    """`export`."""
    parser = verbs.add_parser(
        "export",
        help="a dataset folder as plain files that other tools read",
        description="Write the samples of a dataset folder as JSON lines with messages, one file a split, media beside "
        "them: in tar files (layout tars, that of Nemotron-VLM-Dataset-v2) or as single files (layout folder, that of "
        "a folder with metadata.jsonl). Samples set aside are left out. `nemovl data import` reads both back.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--layout", default="tars", help=f"{' or '.join(_EXPORT_LAYOUTS)} (default: %(default)s)")
    parser.add_argument("--split", help="only this split")
    add_json(parser)
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> int:
    if args.layout not in _EXPORT_LAYOUTS:
        raise DataError(f"--layout {args.layout!r} is not one of {', '.join(_EXPORT_LAYOUTS)}")
    check_dataset(args.folder)
    from data_pipelines.export import export

    result = export(args.folder, args.out, layout=args.layout, split=args.split)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    for name, count in result["splits"].items():
        print(f"{name}: {count['samples']} samples, {count['media']} media")
    print(f"wrote {args.out}; reads back with: nemovl data import {args.out} --out DATASET --like {args.folder}")
    return 0
