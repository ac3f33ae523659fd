"""`nemovl launch torchrun`: one run on several processes of this machine."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from nemovl_train.config.app import split_recipe
from nemovl_train.config.compose import compose_run
from nemovl_train.config.validate import world_problems
from nemovl_train.exceptions import ConfigError, UserError

MAX_PROCESSES = 64
"""Far above any single machine's GPUs; a larger number is a slip of the finger."""


def torchrun_command(overrides: Sequence[str], nproc: int) -> list[str]:
    """Checks the recipe for this number of processes and renders the command line.

    Args:
        overrides: `recipe=NAME` and `key=value` changes.
        nproc: Processes, one for each GPU where there are any.

    Raises:
        UserError: The number of processes makes no sense.
        ConfigError: The recipe has problems, by itself or on this many processes.
    """
    if not 1 <= nproc <= MAX_PROCESSES:
        raise UserError(f"--nproc {nproc}: between 1 and {MAX_PROCESSES}, one process for each GPU of this machine")
    recipe, changes = split_recipe(overrides)
    problems = world_problems(compose_run(recipe, changes), nproc)
    if problems:
        raise ConfigError(problems)
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes=1",
        f"--nproc-per-node={nproc}",
        "--max-restarts=0",
        # SIGUSR1 is not in torchrun's default list: it would end the launcher and leave the processes behind.
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "-m",
        "nemovl_train.train",
        f"recipe={recipe}",
        *changes,
    ]


def add_launch_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `launch` and its verbs to the `nemovl` command; each sets `run`, a function of the parsed arguments."""
    launch = subparsers.add_parser("launch", help="the same run on several processes")
    verbs = launch.add_subparsers(metavar="VERB", required=True)
    parser = verbs.add_parser("torchrun", help="on several processes of this machine")
    parser.add_argument("overrides", nargs="*", metavar="recipe=NAME key=value", help="as for nemovl train")
    parser.add_argument("--nproc", type=int, required=True, help="processes, one for each GPU")
    parser.add_argument("--dry-run", action="store_true", help="print the command line, do not run it")
    parser.set_defaults(run=_torchrun)


def _torchrun(args: argparse.Namespace) -> int:
    command = torchrun_command(args.overrides, args.nproc)
    print(shlex.join(command), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
    if args.dry_run:
        return 0
    # Replacing this process lets signals reach torchrun. It reports every failure, a requeue included, as 1.
    os.execv(command[0], command)
