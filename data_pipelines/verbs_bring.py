"""The `nemovl data` verbs that bring data in: `import`, `frames`, `render-pdf`."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from data_pipelines.arguments import Subparsers, add_json, check_exists, check_positive
from data_pipelines.exceptions import DataError

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
    parser.add_argument("--think", action="store_true", help="reasoning on (/think) where an answer holds a trace")
    parser.add_argument(
        "--heldout", type=float, default=0.0, metavar="SHARE",
        help="put about this share of the samples into the split heldout, such as 0.05 (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-text", action="store_true", help="rows of a table need no image or video (format folder)"
    )
    parser.add_argument("--limit", type=int, help="only the first samples of each split")
    parser.add_argument(
        "--max-bad", type=float, default=0.05, help="share of rows that may be left out (default: 0.05)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--shard-mib", type=float, default=64, help="size of a shard in MiB (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier try left and start again")
    _add_rules(parser)
    add_json(parser)
    parser.set_defaults(run=_run_import)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rules", "must be those of the recipe that will train on the data (data.*)")
    group.add_argument("--like", type=Path, help="dataset folder whose rules and tokenizer are used")
    group.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json: the model's, or runs/tiny/hf")
    group.add_argument("--tile-size", type=int, help="side of a tile in pixels (default: 512; 64 for the tiny recipes)")
    group.add_argument("--max-tiles", type=int, help="largest grid of one image (default: 12; tiny: 6)")
    group.add_argument("--max-frames", type=int, help="most frames of a video (default: 128; tiny: 16)")
    group.add_argument("--video-fps", type=float, help="frames sampled per second (default: 2)")
    group.add_argument("--video-pruning-rate", type=float, help="share of a video's visual tokens to drop (default: 0)")


def _rules(args: argparse.Namespace) -> tuple[Any, Path]:
    """Rules and tokenizer that the arguments ask for."""
    from data_pipelines.config import DataConfig
    from data_pipelines.dataset import read_info
    from data_pipelines.media.rules import RenderRules

    rules: dict[str, Any] = dict(RenderRules.from_config(DataConfig()).__dict__)
    tokenizer = args.tokenizer
    if args.like is not None:
        rules.update(read_info(args.like)["rules"])
        own = args.like / "tokenizer.json"
        tokenizer = tokenizer or (args.like if own.exists() else None)
    for name in ("tile_size", "max_tiles", "max_frames", "video_fps", "video_pruning_rate"):
        if (value := getattr(args, name)) is not None:
            rules[name] = value
    if tokenizer is None and args.like is not None:
        raise DataError(
            f"{args.like} holds no tokenizer of its own: add --tokenizer FOLDER, the one it was counted with"
        )
    if tokenizer is None:
        raise DataError(
            "no tokenizer to count tokens with: add --tokenizer FOLDER, the model's Hugging Face folder (after `make "
            "demo`: --tokenizer runs/tiny/hf --tile-size 64 --max-tiles 6 --max-frames 16), or --like DATASET, a "
            "dataset folder whose tokenizer and rules are used"
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
        columns=ColumnOptions(task=args.task, columns=columns, box_format=args.box_format, box_units=args.box_units),
        ids=args.ids,
        think=args.think,
        heldout=args.heldout,
        allow_text=args.allow_text,
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


def add_frames(verbs: Subparsers) -> None:
    """`frames`."""
    parser = verbs.add_parser("frames", help="reduce videos to the frames that training looks at, before an import")
    parser.add_argument("source", type=Path, metavar="SRC", help="video, or folder with videos and their metadata")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second (default: %(default)s)")
    parser.add_argument("--max-frames", type=int, default=128, help="most frames of a video (default: %(default)s)")
    parser.add_argument("--side", type=int, default=512, help="longest shorter side in pixels (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_run_frames)


def _run_frames(args: argparse.Namespace) -> int:
    check_positive(args, "fps", "max_frames", "side")
    check_exists(args.source)
    from data_pipelines.prepare import extract_frames

    result = extract_frames(args.source, args.out, fps=args.fps, max_frames=args.max_frames, side=args.side)
    return _print_prepared(args, result, f"{result['videos']} videos, {result['frames']} frames")


def add_render_pdf(verbs: Subparsers) -> None:
    """`render-pdf`."""
    parser = verbs.add_parser("render-pdf", help="PDF pages as pictures with a metadata file, to add questions to")
    parser.add_argument("source", type=Path, metavar="SRC", help="PDF, or folder with PDFs")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--dpi", type=int, default=150, help="resolution (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_run_render_pdf)


def _run_render_pdf(args: argparse.Namespace) -> int:
    check_positive(args, "dpi")
    check_exists(args.source)
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
