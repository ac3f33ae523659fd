"""The `nemovl data` verbs. Nothing heavy is imported until a verb runs, so that --help answers at once."""

import argparse
import json
from pathlib import Path
from typing import Any

from data_pipelines import verbs_bring, verbs_curate, verbs_look
from data_pipelines.arguments import Subparsers, add_json

_VERBS = (
    verbs_bring.add_import,
    verbs_look.add_validate,
    verbs_look.add_stats,
    verbs_look.add_show,
    verbs_look.add_quarantine,
    verbs_curate.add_dedup,
    verbs_curate.add_export,
    verbs_bring.add_frames,
    verbs_bring.add_render_pdf,
)
"""Parsers, in the order of --help."""


def make_demo(out: Path, *, seed: int = 1234, scale: float = 1.0) -> dict[str, Any]:
    """Builds the offline demo data; see `data_pipelines.demo.make.make_demo`."""
    from data_pipelines.demo import make

    return make.make_demo(out, seed=seed, scale=scale)


def add_data_commands(subparsers: Subparsers) -> Subparsers:
    """Adds `data` and its verbs to the `nemovl` command; each sets `run`, a function of the parsed arguments.

    Returns:
        The verbs, so that those which need a whole recipe can be added by who knows recipes.
    """
    data = subparsers.add_parser("data", help="make and look at datasets")
    verbs = data.add_subparsers(dest="data_command", required=True, metavar="VERB")
    demo = verbs.add_parser("make-demo", help="build the offline demo datasets and their tokenizer")
    demo.add_argument("--out", type=Path, required=True, help="folder to write (left alone when it is complete)")
    demo.add_argument("--seed", type=int, default=1234, help="seed of the generators (default: %(default)s)")
    demo.add_argument("--scale", type=float, default=1.0, help="factor on the sample counts (default: %(default)s)")
    add_json(demo)
    demo.set_defaults(run=_run_make_demo)
    for add_verb in _VERBS:
        add_verb(verbs)
    return verbs


def _run_make_demo(args: argparse.Namespace) -> int:
    record = make_demo(args.out, seed=args.seed, scale=args.scale)
    if args.json:
        print(json.dumps({"out": str(args.out), **record}, indent=1))
        return 0
    print(f"{'dataset':<14}{'train':>7}{'heldout':>9}{'tokens':>9}{'answer':>8}{'tiles':>7}   (means over train)")
    for name, splits in record["datasets"].items():
        train, heldout = splits["train"], splits["heldout"]
        print(
            f"{name:<14}{train['samples']:>7}{heldout['samples']:>9}{train['mean_tokens']:>9.1f}"
            f"{train['mean_supervised_tokens']:>8.1f}{train['mean_tiles']:>7.2f}"
        )
    print(f"{'found complete in' if record['reused'] else 'written to'} {args.out}")
    return 0
