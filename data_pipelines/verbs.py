"""The `nemovl data` verbs that bring data in and look at them: arguments here, work in the modules they import."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.exceptions import DataError

type Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_IMPORT_ABOUT = """Import a dataset into shards and a manifest. The same command continues where it was
interrupted. Formats: auto, nemotron-v2, nemotron-v1, llava, sharegpt, openai, hf (Parquet
or save_to_disk), webdataset, energon, folder (media with metadata.jsonl or .csv), pdf,
text, code."""


def add_import(verbs: Subparsers) -> None:
    """`import`."""
    parser = verbs.add_parser(
        "import",
        help="any dataset into shards and a manifest",
        description=_IMPORT_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="file or folder")
    parser.add_argument("--out", type=Path, required=True, help="dataset folder to make")
    parser.add_argument("--format", default="auto", help="as listed above (default: %(default)s)")
    parser.add_argument("--name", help="name of the dataset (default: that of --out)")
    parser.add_argument("--split", help="put everything into this split (default: by file names, else train)")
    parser.add_argument(
        "--media-root", type=Path, action="append", default=[], help="folder that media may lie in; may be repeated"
    )
    parser.add_argument(
        "--task",
        help="what columns mean: caption, vqa, multiple_choice, grounding, ocr, document, classification, temporal, "
        "dense_caption (default: by their names)",
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="ROLE=NAME", help="column of a role, such as answer=label"
    )
    parser.add_argument("--box-format", default="xyxy", help="boxes of grounding: xyxy or xywh (default: %(default)s)")
    parser.add_argument("--box-units", default="pixel", help="pixel, unit (0 to 1) or thousand (default: %(default)s)")
    parser.add_argument("--ids", default="source", help="source (a row's own id) or position (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first samples of each split")
    parser.add_argument("--max-bad", type=float, default=0.05, help="share of rows that may be left out (default: 0.05)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--shard-mib", type=float, default=64, help="size of a shard in MiB (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="throw away an unfinished import with other options")
    _add_rules(parser)
    _add_json(parser)
    parser.set_defaults(run=_run_import)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rules", "must be those of the recipe that will train on the data (data.*)")
    group.add_argument("--like", type=Path, help="dataset folder whose rules and, if it has one, tokenizer are used")
    group.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json: the model's, or runs/tiny/hf")
    group.add_argument("--tile-size", type=int, help="side of a tile in pixels (default: 512; 64 for the tiny recipes)")
    group.add_argument("--max-tiles", type=int, help="largest grid of one image (default: 12; tiny: 6)")
    group.add_argument("--max-frames", type=int, help="most frames of a video (default: 128; tiny: 16)")
    group.add_argument("--video-fps", type=float, help="frames sampled per second (default: 2)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _rules(args: argparse.Namespace) -> tuple[Any, Path]:
    """Rules and tokenizer that the arguments ask for."""
    from data_pipelines.config import DataConfig
    from data_pipelines.media.rules import RenderRules
    from data_pipelines.shards import read_info

    rules: dict[str, Any] = dict(RenderRules.from_config(DataConfig()).__dict__)
    tokenizer = args.tokenizer
    if args.like is not None:
        rules.update(read_info(args.like)["rules"])
        own = args.like / "tokenizer.json"
        tokenizer = tokenizer or (args.like if own.exists() else None)
    for name in ("tile_size", "max_tiles", "max_frames", "video_fps"):
        if (value := getattr(args, name)) is not None:
            rules[name] = value
    if tokenizer is None:
        raise DataError(
            "no tokenizer to count tokens with: add --tokenizer FOLDER, the model's Hugging Face folder (after `make "
            "demo`: --tokenizer runs/tiny/hf --tile-size 64 --max-tiles 6 --max-frames 16)"
        )
    return RenderRules(**rules), tokenizer


def _run_import(args: argparse.Namespace) -> int:
    columns = {}
    for text in args.column:
        role, equals, name = text.partition("=")
        if not (role and equals and name):
            raise DataError(f"--column {text!r}: write ROLE=NAME, such as answer=label")
        columns[role] = name
    rules, tokenizer = _rules(args)
    from data_pipelines.importers.job import ImportOptions, run_import
    from data_pipelines.importers.tasks import ColumnOptions

    options = ImportOptions(
        source=args.source,
        out=args.out,
        tokenizer=tokenizer,
        rules=rules,
        format=args.format,
        name=args.name,
        split=args.split,
        media_roots=tuple(args.media_root),
        columns=ColumnOptions(
            task=args.task, columns=columns, box_format=args.box_format, box_units=args.box_units
        ),
        ids=args.ids,
        limit=args.limit,
        workers=args.workers,
        max_bad=args.max_bad,
        shard_mib=args.shard_mib,
        restart=args.restart,
    )
    result = run_import(options)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    for split, counts in result["splits"].items():
        print(
            f"{split}: {counts['samples']} samples, {counts['tiles']} tiles, {counts['total_tokens']} tokens "
            f"({counts['supervised_tokens']} supervised)"
        )
    for reason, count in result["rejected"].items():
        print(f"left out ({reason}): {count}")
    if result["rejected"]:
        print(f"why: nemovl data quarantine list {args.out}")
    print(f"wrote {args.out} in {result['seconds']:.1f} s; next: nemovl data validate {args.out}")
    return 0


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
    _add_json(parser)
    parser.set_defaults(run=_run_validate)


def _run_validate(args: argparse.Namespace) -> int:
    _check_positive(args, "workers", "seq_length")
    _check_dataset(args.folder)
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
    _add_json(parser)
    parser.set_defaults(run=_run_stats)


def _run_stats(args: argparse.Namespace) -> int:
    from data_pipelines.quality.stats import folder_stats, format_stats

    for folder in args.folders:
        _check_dataset(folder)
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
    _add_json(parser)
    parser.set_defaults(run=_run_show)


def _run_show(args: argparse.Namespace) -> int:
    _check_positive(args, "seq_length")
    if not args.folders and args.config is None:
        raise DataError("name a dataset folder, or a run's config: nemovl data show DIR, or --config FILE --pack N")
    if args.pack is None and (len(args.folders) != 1 or args.config is not None):
        raise DataError("a sample is of one dataset folder; add --pack N to see a pack of several, or of a config")
    for folder in args.folders:
        _check_dataset(folder)
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
            action.add_argument("--split", default="train", help="split (default: %(default)s)")
            action.add_argument("--key", action="append", default=[], help="id of a sample; may be repeated")
        if name == "add":
            action.add_argument("--reason", default="set aside by hand", help="why")
        _add_json(action)
        action.set_defaults(run=_run_quarantine, action=name)


def _run_quarantine(args: argparse.Namespace) -> int:
    _check_dataset(args.folder)
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
    if args.action == "add":
        if not args.key:
            raise DataError("name the samples with --key ID; `nemovl data validate DIR --quarantine` takes those with errors")
        count = quarantine.set_aside(args.folder, args.split, dict.fromkeys(args.key, args.reason))
    else:
        count = quarantine.restore(args.folder, args.split, args.key or None)
    verb = "set aside" if args.action == "add" else "restored"
    print(json.dumps({args.action: count}) if args.json else f"{verb} {count} samples of {args.folder}")
    return 0


def add_frames(verbs: Subparsers) -> None:
    """`frames`."""
    parser = verbs.add_parser("frames", help="reduce videos to the frames that training looks at, before an import")
    parser.add_argument("source", type=Path, metavar="SRC", help="video, or folder with videos and their metadata")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second (default: %(default)s)")
    parser.add_argument("--max-frames", type=int, default=128, help="most frames of a video (default: %(default)s)")
    parser.add_argument("--side", type=int, default=512, help="longest shorter side in pixels (default: %(default)s)")
    _add_json(parser)
    parser.set_defaults(run=_run_frames)


def _run_frames(args: argparse.Namespace) -> int:
    _check_positive(args, "fps", "max_frames", "side")
    _check_exists(args.source)
    from data_pipelines.prepare import extract_frames

    result = extract_frames(args.source, args.out, fps=args.fps, max_frames=args.max_frames, side=args.side)
    return _print_prepared(args, result, f"{result['videos']} videos, {result['frames']} frames")


def add_render_pdf(verbs: Subparsers) -> None:
    """`render-pdf`."""
    parser = verbs.add_parser("render-pdf", help="PDF pages as pictures with a metadata file, to add questions to")
    parser.add_argument("source", type=Path, metavar="SRC", help="PDF, or folder with PDFs")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--dpi", type=int, default=150, help="resolution (default: %(default)s)")
    _add_json(parser)
    parser.set_defaults(run=_run_render_pdf)


def _run_render_pdf(args: argparse.Namespace) -> int:
    _check_positive(args, "dpi")
    _check_exists(args.source)
    from data_pipelines.prepare import render_pdfs

    result = render_pdfs(args.source, args.out, dpi=args.dpi)
    return _print_prepared(args, result, f"{result['documents']} documents, {result['pages']} pages")


def _print_prepared(args: argparse.Namespace, result: dict[str, Any], counts: str) -> int:
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for failed in result["failed"]:
            print(f"left out: {failed['file']}: {failed['reason']}")
        print(f"{counts}; next: nemovl data import {args.out} --out DATASET --tokenizer FOLDER")
    return int(bool(result["failed"]))


def _check_positive(args: argparse.Namespace, *names: str) -> None:
    wrong = [name for name in names if getattr(args, name) is not None and not getattr(args, name) > 0]
    if wrong:
        raise DataError("; ".join(f"--{n.replace('_', '-')} {getattr(args, n)} must be above 0" for n in wrong))


def _check_exists(source: Path) -> None:
    if not source.exists():
        raise DataError(f"{source}: there is no such file or folder")


def _check_dataset(folder: Path) -> None:
    if not (folder / "dataset.json").is_file():
        _check_exists(folder)
        raise DataError(f"{folder} is not a dataset folder yet: nemovl data import {folder} --out DATASET --tokenizer FOLDER")


_SHOWN = 50
_PAGE_PROBLEMS = 2000
VERBS: tuple[Callable[[Subparsers], None], ...] = (
    add_import,
    add_validate,
    add_stats,
    add_show,
    add_quarantine,
    add_frames,
    add_render_pdf,
)
"""Parsers, in the order of --help."""
