"""Arguments that several `nemovl data` verbs have, and checks of them."""

import argparse
from pathlib import Path

from data_pipelines.exceptions import DataError, no_dataset

type Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse options that must be above 0 and are not.

    Raises:
        DataError: All of them.
    """
    wrong = [name for name in names if getattr(args, name) is not None and not getattr(args, name) > 0]
    if wrong:
        raise DataError("; ".join(f"--{n.replace('_', '-')} {getattr(args, n)} must be above 0" for n in wrong))


def check_exists(source: Path) -> None:
    """Refuse a source that is not there.

    Raises:
        DataError: With its name.
    """
    if not source.exists():
        raise DataError(f"{source}: there is no such file or folder")


def check_dataset(folder: Path) -> None:
    """Refuse a folder that is not a dataset folder.

    Raises:
        DataError: With the command that makes one of it.
    """
    if not (folder / "dataset.json").is_file():
        raise no_dataset(folder, exists=folder.exists())
