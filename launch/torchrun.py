"""`nemovl launch`: one run on several processes, of this machine, of several machines, or of a SLURM cluster."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.node import NodeJob, run_node
from launch.program import Program, program_of
from nemovl_train.exceptions import UserError

MAX_PROCESSES = 64
"""Far above any single machine's GPUs; a larger number is a slip of the finger."""
_ENDPOINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]{2,5}")


def torchrun_job(
    overrides: Sequence[str], nproc: int, *, nnodes: int = 1, rendezvous: str = "", max_restarts: int = 0
) -> tuple[NodeJob, Program]:
    """Checks the recipe for this number of processes.

    Args:
        overrides: `recipe=NAME` and `key=value` changes.
        nproc: Processes of each node, one for each GPU where there are any.
        nnodes: Nodes.
        rendezvous: `HOST:PORT` of the first node.
        max_restarts: Times that the processes are started again after a failure.

    Raises:
        UserError: Numbers that make no sense.
        ConfigError: The recipe has problems, by itself, on this many processes, or on nodes of this size.
    """
    if not 1 <= nproc <= MAX_PROCESSES:
        raise UserError(f"--nproc {nproc}: between 1 and {MAX_PROCESSES}, one process for each GPU of this machine")
    if nnodes < 1 or max_restarts < 0:
        raise UserError(f"--nnodes {nnodes} --max-restarts {max_restarts}: at least 1 node and 0 restarts")
    if nnodes > 1 and not _ENDPOINT.fullmatch(rendezvous):
        raise UserError(
            f"--rendezvous {rendezvous!r}: give HOST:PORT of the first of {nnodes} nodes, such as node1:29500"
        )
    program = program_of(overrides, nodes=nnodes, per_node=nproc)
    run_id = program.run.replace("/", "-")
    job = NodeJob(nproc=nproc, nnodes=nnodes, rendezvous=rendezvous, run_id=run_id, max_restarts=max_restarts)
    return job, program


def add_launch_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `launch` and its verbs to the `nemovl` command; each sets `run`, a function of the parsed arguments."""
    from launch.submit import add_slurm_command

    launch = subparsers.add_parser("launch", help="the same run on several processes")
    verbs = launch.add_subparsers(metavar="VERB", required=True)
    parser = verbs.add_parser("torchrun", help="on several processes of this machine, or of each of several")
    parser.add_argument("overrides", nargs="*", metavar="recipe=NAME key=value", help="as for nemovl train")
    parser.add_argument("--nproc", type=int, required=True, help="processes of each node, one for each GPU")
    parser.add_argument("--nnodes", type=int, default=1, help="nodes; give the same command on each (default: 1)")
    parser.add_argument("--rendezvous", default="", metavar="HOST:PORT", help="where the nodes meet: the first of them")
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="start the processes again when one fails (default: 0)"
    )
    parser.add_argument("--caches", type=Path, help="local folder for compiled kernels")
    parser.add_argument("--dry-run", action="store_true", help="print the command line, do not run it")
    parser.set_defaults(run=_torchrun)
    add_slurm_command(verbs)


def _torchrun(args: argparse.Namespace) -> int:
    job, program = torchrun_job(
        args.overrides,
        args.nproc,
        nnodes=args.nnodes,
        rendezvous=args.rendezvous,
        max_restarts=args.max_restarts,
    )
    for note in program.notes:
        print(f"note: {note}", file=sys.stderr)
    command = job.command(program.arguments)
    print(shlex.join(command), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
    if args.dry_run:
        return 0
    return run_node(job, program.arguments, caches=args.caches)
