"""`nemovl convert import | export | verify`. Heavy modules are imported when a verb runs, so that --help is instant."""

import argparse
import json
from pathlib import Path
from typing import Any

from nemovl_train.exceptions import ConversionError
from nemovl_train.exit_codes import ExitCode


def add_convert_commands(subparsers: Any) -> None:
    """Register `convert` and its verbs on the parser of the `nemovl` command.

    Args:
        subparsers: What `argparse.ArgumentParser.add_subparsers` returned.
    """
    parser = subparsers.add_parser("convert", help="to and from Hugging Face folders")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    importer = verbs.add_parser("import", help="Hugging Face folder -> checkpoint for trainer.init_from")
    importer.add_argument(
        "hf_dir", metavar="HF_DIR", help="folder of a VLM, a text model or a tower, or hf:ORGANISATION/NAME@REVISION"
    )
    importer.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    importer.set_defaults(run=_import)

    exporter = verbs.add_parser("export", help="run or checkpoint -> Hugging Face folder")
    exporter.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run, stage or checkpoint folder")
    exporter.add_argument("--out", type=Path, required=True, help="new folder")
    exporter.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the run's own)")
    exporter.add_argument("--dtype", choices=("fp32", "bf16"), help="number format (default: that of the checkpoint)")
    exporter.add_argument("--fp8", action="store_true", help="the language model's linear layers in FP8, for serving")
    exporter.add_argument("--adapters", action="store_true", help="adapters alone, in the layout of the peft library")
    exporter.add_argument("--merge", action="store_true", help="merge adapters into their base first")
    exporter.add_argument("--base", type=Path, help="for --merge: the adapted checkpoint, if it was moved")
    exporter.add_argument("--logits", action="store_true", help="for --merge: compare logits of the whole model first")
    exporter.add_argument("--overwrite", action="store_true", help="replace an earlier export of that name")
    exporter.set_defaults(run=_export)

    merger = verbs.add_parser("merge", help="run with adapters -> checkpoint of whole weights")
    merger.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run, stage or checkpoint folder")
    merger.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    merger.add_argument("--base", type=Path, help="the adapted checkpoint, if it was moved since training")
    merger.add_argument("--dtype", choices=("fp32", "bf16"), help="number format (default: that of the run)")
    merger.add_argument("--logits", action="store_true", help="compare logits of the whole model first, in memory")
    merger.set_defaults(run=_merge)

    checker = verbs.add_parser("verify", help="reload with Transformers and compare logits")
    checker.add_argument("hf_dir", type=Path, metavar="DIR", help="exported folder")
    checker.add_argument("--reference", type=Path, help="checkpoint that every tensor must equal")
    checker.add_argument(
        "--logits",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare logits, which takes the whole model in memory (default: where there is room)",
    )
    checker.set_defaults(run=_verify)

    for verb in (importer, exporter, merger, checker):
        verb.add_argument("--json", action="store_true", help="print one JSON document")


def _import(args: argparse.Namespace) -> int:
    from nemovl_train.convert.source import local_folder

    folder = local_folder(args.hf_dir)
    from nemovl_train.convert.checkpoints import import_checkpoint

    path = import_checkpoint(folder, args.out, source=args.hf_dir if args.hf_dir.startswith("hf:") else None)
    _print(args, {"checkpoint": str(path)}, f"imported {args.hf_dir}; train with trainer.init_from={path}")
    return ExitCode.OK


def _export(args: argparse.Namespace) -> int:
    _need_folder(args.source)
    if args.adapters:
        return _export_adapters(args)
    options = {"tokenizer": args.tokenizer, "dtype": args.dtype, "overwrite": args.overwrite, "fp8": args.fp8}
    if not args.merge and (args.base or args.logits):
        raise ConversionError(f"--{'base' if args.base else 'logits'} goes with --merge")
    if args.merge:
        from nemovl_train.convert.adapters import export_merged

        path = export_merged(args.source, args.out, base=args.base, logits=args.logits, **options)
    else:
        from nemovl_train.convert.checkpoints import export_checkpoint

        path = export_checkpoint(args.source, args.out, **options)
    _print(args, {"folder": str(path)}, f"wrote {path}; check it with: nemovl convert verify {path}")
    return ExitCode.OK


def _export_adapters(args: argparse.Namespace) -> int:
    given = [
        flag for flag in ("tokenizer", "dtype", "merge", "base", "overwrite", "fp8", "logits") if getattr(args, flag)
    ]
    if given:
        raise ConversionError(f"--adapters goes without --{given[0]}")
    from nemovl_train.convert.adapters import export_adapters

    made = export_adapters(args.source, args.out)
    _print(args, made, f"wrote {made['folder']}: adapters of {made['layers']} layers")
    return ExitCode.OK


def _merge(args: argparse.Namespace) -> int:
    _need_folder(args.source)
    from nemovl_train.convert.adapters import merge_checkpoint

    made = merge_checkpoint(args.source, args.out, base=args.base, dtype=args.dtype, logits=args.logits)
    text = (
        f"merged {args.source}: outputs of {made['layers']} layers differ by {made['largest_difference']:.1g} at most"
    )
    _print(args, made, f"{text}; export it with: nemovl convert export {args.out} --out DIR")
    return ExitCode.OK


def _verify(args: argparse.Namespace) -> int:
    _need_folder(args.hf_dir)
    from nemovl_train.convert.verify import card_text, verify

    card = verify(args.hf_dir, reference=args.reference, logits=args.logits)
    _print(args, card, card_text(card).rstrip())
    return ExitCode.OK if card["ok"] else ExitCode.FAILED


def _need_folder(path: Path) -> None:
    if not path.is_dir():
        raise ConversionError(f"{path} is not a folder")


def _print(args: argparse.Namespace, document: Any, text: str) -> None:
    print(json.dumps(document) if args.json else text)
