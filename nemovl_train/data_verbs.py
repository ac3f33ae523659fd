"""The `nemovl data` verbs that need a whole recipe: what its data will be, and how fast they come."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.arguments import Subparsers, add_json, check_positive
from nemovl_train.exit_codes import ExitCode

if TYPE_CHECKING:
    from nemovl_train.config.schema import RunConfig


def add_recipe_verbs(verbs: Subparsers) -> None:
    """Adds `plan` and `bench` to the `nemovl data` command."""
    plan = verbs.add_parser("plan", help="a recipe's packs, blend and balance, from lengths alone")
    _add_recipe(plan)
    plan.add_argument("--ranks", type=int, help="data parallel ranks that share a step (default: 32, or the batch)")
    plan.add_argument("--windows", type=int, help="windows to look at (default: the run's, at most 8)")
    plan.set_defaults(run=_plan)
    bench = verbs.add_parser("bench", help="build packs of a recipe and say what takes the time")
    _add_recipe(bench)
    bench.add_argument("--packs", type=int, default=32, help="packs to build (default: %(default)s)")
    bench.add_argument(
        "--gpu-tokens-per-s",
        type=float,
        default=5000.0,
        help="tokens that one GPU trains on a second (default: %(default)s, about a 12B model on one H100)",
    )
    bench.set_defaults(run=_bench)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="recipe=NAME [key=value ...]", help="as for `nemovl train`")
    parser.add_argument("--config-dir", type=Path, help="search this folder for config groups first")
    add_json(parser)


def _config(args: argparse.Namespace) -> "RunConfig":
    from nemovl_train.config.app import split_recipe
    from nemovl_train.config.compose import compose_run

    recipe, overrides = split_recipe(args.overrides)
    return compose_run(recipe, overrides, config_dirs=[args.config_dir] if args.config_dir else [])


def _plan(args: argparse.Namespace) -> int:
    check_positive(args, "windows", "ranks")
    config = _config(args)
    from data_pipelines.forecast import as_text, forecast
    from data_pipelines.loader import open_sources, plan_of

    batch = config.trainer.global_batch
    opened = open_sources(config.data, config.model.tokens_per_tile)
    plan = plan_of(config.data, opened, seed=config.trainer.seed, global_batch=batch)
    found = forecast(
        plan,
        steps=config.trainer.steps,
        global_batch=batch,
        ranks=args.ranks or min(32, batch),
        windows=args.windows,
    )
    print(json.dumps(found, indent=1) if args.json else as_text(found))
    return ExitCode.OK


def _bench(args: argparse.Namespace) -> int:
    check_positive(args, "packs", "gpu_tokens_per_s")
    config = _config(args)
    from data_pipelines.bench import as_text, bench

    found = bench(
        config.data,
        tokens_per_tile=config.model.tokens_per_tile,
        seed=config.trainer.seed,
        global_batch=config.trainer.global_batch,
        packs=args.packs,
        tokens_per_second=args.gpu_tokens_per_s,
        ranks_per_pack=config.parallel.tp * config.parallel.cp,
        ranks_per_node=config.cluster.gpus_per_node,
    )
    print(json.dumps(found, indent=1) if args.json else as_text(found))
    return ExitCode.OK
