"""Starts a benchmark's own script once a rank."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def rank_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every such script takes; `rank` is None in the process that a person started."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser


def start_ranks(processes: int) -> None:
    """Run this command again as every rank, with a file store to meet at, and wait.

    Raises:
        AssertionError: A rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, *sys.argv, "--store", f"{folder}/store"]
        ranks = [subprocess.Popen([*own, "--rank", str(rank)]) for rank in range(processes)]
        codes = [rank.wait() for rank in ranks]
    assert codes == [0] * processes, codes
