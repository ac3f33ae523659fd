"""Hydra's command line for the verbs that take a recipe.

A plain run is composed directly: no working folder of Hydra's, no logging set-up, every problem reported at once. The
flags that Hydra users know (`--cfg`, `--info`, `-m`, shell completion) go through Hydra itself.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nemovl_train.config.compose import compose_run, compose_schedule, from_hydra, search_path_overrides
from nemovl_train.config.hydra_setup import PRIMARY, install
from nemovl_train.config.schema import RunConfig, ScheduleConfig
from nemovl_train.exceptions import ConfigError, UserError

type Config = RunConfig | ScheduleConfig

USAGE = """usage: nemovl {verb} recipe=NAME [key=value ...] [flags]

{what}

  recipe=NAME          a shipped recipe (`nemovl recipes list`) or a file of your own (recipe=my.yaml)
  key=value            change an option, for example optim.lr=1e-4; group=option swaps a config group

flags:
  --cfg job [--resolve] [-p SECTION]   print the config instead of running it
  --info [defaults|defaults-tree|searchpath|config|plugins|all]
                       where each value comes from
  -m                   one run for each of several values: -m optim.lr=1e-4,2e-4 'run.stage=lr_${{optim.lr}}'
  --config-dir DIR     search this folder for config groups first
  -h, --help           this text"""


def run_app(kind: str, argv: Sequence[str], job: Callable[[Config], int], *, reads_only: str = "") -> int:
    """Does what the arguments of a verb that takes a recipe say.

    Args:
        kind: `run` or `schedule`.
        argv: Arguments behind the verb.
        job: Runs a checked config and returns the exit code.
        reads_only: Name of a verb that writes nothing, so that the runs of a sweep may share a folder; `train` or
            `schedule`, after the kind, when empty.

    Returns:
        The job's exit code; the largest one of a sweep.

    Raises:
        ConfigError: Every problem of the config.
        UserError: Flags that do not go together.
    """
    parser = get_args_parser()
    parser.prog = f"nemovl {reads_only or PRIMARY[kind]}"
    # Hydra's own entry refuses overrides behind a flag (`--cfg job optim.lr=1`); people write them in any order.
    args = parser.parse_intermixed_args(list(argv))
    flags = _flags(argv, args.overrides)
    if args.experimental_rerun:
        raise UserError("--experimental-rerun unpickles a file and is not supported; run the recipe again")
    if args.config_path or args.config_name:
        raise UserError("--config-path and --config-name are fixed; add folders with --config-dir")
    if args.cfg:
        # Hydra would show `+typo=1` as part of the config: what it shows is checked first.
        _compose(kind, args)
    if args.multirun and not reads_only:
        _check_sweep(args.overrides)
    if args.cfg or args.info or args.multirun or args.hydra_help or args.shell_completion:
        return _through_hydra(kind, args, flags, job)
    return job(_compose(kind, args))


def split_recipe(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `recipe=NAME` out of the overrides.

    Raises:
        ConfigError: It is missing or given twice.
    """
    recipes = [text.partition("=")[2] for text in overrides if text.startswith("recipe=")]
    if len(recipes) != 1:
        what = "is missing" if not recipes else "is given more than once"
        raise ConfigError([f"recipe=NAME {what}; `nemovl recipes list` shows the names"])
    return recipes[0], [text for text in overrides if not text.startswith("recipe=")]


def complete(argv: Sequence[str], verbs: Sequence[str]) -> int:
    """Shell completion: `nemovl -sc install=bash` and the queries of the script that it prints."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if argv[1:2] and argv[1].startswith("query=") and len(words) < 3:
        print(" ".join(verbs))
        return 0
    kind = "schedule" if words[1:2] == ["schedule"] else "run"
    # Hydra completes `program key=value`: hide the verb from it.
    os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    args = get_args_parser().parse_args(list(argv))
    return _through_hydra(kind, args, _flags(argv, args.overrides), lambda _: 0)


def _compose(kind: str, args: argparse.Namespace) -> Config:
    recipe, overrides = split_recipe(args.overrides)
    folders = [Path(args.config_dir)] if args.config_dir else []
    return (compose_schedule if kind == "schedule" else compose_run)(recipe, overrides, config_dirs=folders)


def _through_hydra(kind: str, args: argparse.Namespace, flags: list[str], job: Callable[[Config], int]) -> int:
    codes = [0]

    def task(config: DictConfig) -> None:
        codes.append(job(from_hydra(kind, config)))

    # Hydra finds the calling module by this name; it names the job and nothing else.
    task.__module__ = __name__
    install()
    with _command_line(["nemovl", *flags, *_with_recipe_file(args.overrides)]):
        try:
            hydra.main(config_path=None, config_name=PRIMARY[kind], version_base="1.3")(task)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([str(error.__cause__ or error).strip()]) from error
    return max(codes)


def _flags(argv: Sequence[str], overrides: Sequence[str]) -> list[str]:
    flags = list(argv)
    for text in overrides:
        flags.remove(text)
    return flags


def _check_sweep(overrides: Sequence[str]) -> None:
    """Runs of a sweep that share a folder would each refuse the other's checkpoints, the first one excepted."""
    own_folder = any(text.startswith(("run.stage=", "run.name=")) for text in overrides)
    many_recipes = any(text.startswith("recipe=") and "," in text for text in overrides)
    if not (own_folder or many_recipes):
        raise ConfigError(
            ["-m: every run needs a folder of its own; add 'run.stage=lr_${optim.lr}' with the key that you vary"]
        )


def _with_recipe_file(overrides: Sequence[str]) -> list[str]:
    """Replaces `recipe=FILE.yaml` by a search path entry and the name of the file."""
    result: list[str] = []
    for text in overrides:
        if text.startswith("recipe=") and text.endswith(".yaml") and "," not in text:
            found, name = search_path_overrides(text.partition("=")[2])
            result += [*found, f"recipe={name}"]
        else:
            result.append(text)
    return result


@contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and prints errors itself and exits unless HYDRA_FULL_ERROR is set."""
    saved_argv, saved_flag = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        if saved_flag is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_flag
