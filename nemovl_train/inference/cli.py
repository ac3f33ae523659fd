"""`nemovl generate`. Heavy modules are imported when the verb runs, so that --help is instant."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemovl_train.exceptions import UserError
from nemovl_train.exit_codes import ExitCode

if TYPE_CHECKING:
    from nemovl_train.inference.answer import Decoding, Question


def add_generate_command(subparsers: Any) -> None:
    """Register `generate` on the parser of the `nemovl` command.

    Args:
        subparsers: What `argparse.ArgumentParser.add_subparsers` returned.
    """
    parser = subparsers.add_parser("generate", help="answer questions about images and videos")
    parser.add_argument("folder", type=Path, help="exported Hugging Face folder, such as runs/tiny/hf")
    parser.add_argument("--prompt", help="the question; images and videos come before it")
    parser.add_argument("--image", type=Path, action="append", default=[], help="image file; may be repeated")
    parser.add_argument("--video", type=Path, action="append", default=[], help="video file; may be repeated")
    parser.add_argument("--system", default="", help="system text (default: empty)")
    parser.add_argument("--think", action="store_true", help="turn reasoning on, as /think in a text does")
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="answer many at once: JSON lines with prompt, images, videos, system, think; paths from the file's folder",
    )
    add_decoding_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_generate)


def add_decoding_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int = 128) -> None:
    """Register what `decoding` reads."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most likely token (default), above 0 draws"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TOKEN", help="token that ends an answer; may be repeated"
    )
    parser.add_argument(
        "--video-pruning-rate",
        type=float,
        default=0.0,
        metavar="Q",
        help="share of a video's visual tokens to drop, 0 to 0.99 (Efficient Video Sampling; default: %(default)s)",
    )


def decoding(args: argparse.Namespace) -> Decoding:
    """How answers are written, from the arguments of `add_decoding_arguments`.

    Raises:
        UserError: A value is out of range.
    """
    from nemovl_train.inference.answer import Decoding
    from nemovl_train.inference.sampling import Sampling

    return Decoding(
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed),
        stop=args.stop,
        video_pruning_rate=args.video_pruning_rate,
    )


def _generate(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.questions is None):
        raise UserError("give --prompt TEXT for one question, or --questions FILE for many")
    _need(args.folder)
    rows = _rows(args)
    for row in rows:
        for path in (*row["images"], *row["videos"]):
            _need(path)
    from nemovl_train.console import setup_logging
    from nemovl_train.inference.answer import Question, answer_all

    setup_logging()
    how = decoding(args)
    questions: list[Question] = [Question(**row) for row in rows]
    texts = answer_all(args.folder, questions, how)
    documents = [{"prompt": row["prompt"], "answer": text} for row, text in zip(rows, texts, strict=True)]
    if args.questions is None:
        print(json.dumps(documents[0]) if args.json else texts[0])
    elif args.json:
        print(json.dumps(documents, indent=1))
    else:
        print("\n".join(json.dumps(document) for document in documents))
    return ExitCode.OK


def _need(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fields of `Question` for every question."""
    if args.questions is None:
        one = {"prompt": args.prompt, "images": args.image, "videos": args.video}
        return [{**one, "system": args.system, "think": args.think}]
    if args.image or args.video:
        raise UserError("--image and --video belong to --prompt; a questions file names its own")
    _need(args.questions)
    lines = args.questions.read_text(encoding="utf-8").splitlines()
    rows = [_row(line, f"{args.questions}:{i}", args) for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"{args.questions} holds no question")
    return rows


def _row(line: str, where: str, args: argparse.Namespace) -> dict[str, Any]:
    kinds: dict[str, type] = {"prompt": str, "images": list, "videos": list, "system": str, "think": bool}
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f'{where}: write an object with a text under "prompt"')
    wrong = [k for k, v in found.items() if k not in kinds or not isinstance(v, kinds[k])]
    if wrong:
        raise UserError(
            f"{where}: {', '.join(map(repr, wrong))} cannot be used; prompt and system are texts, images and videos "
            "lists of paths, think is true or false"
        )
    row = {"images": [], "videos": [], "system": args.system, "think": args.think, **found}
    folder = args.questions.parent
    return {**row, **{kind: [folder / str(path) for path in row[kind]] for kind in ("images", "videos")}}
