"""What a run says on standard error: one line a message, from one process."""

import logging
import os
import sys
import warnings


def setup_logging() -> None:
    """Information from the first process, warnings from all; standard output stays free for results."""
    rank = int(os.environ.get("RANK", "0"))
    level = logging.INFO if rank == 0 else logging.WARNING
    prefix = f"[rank {rank}] " if rank else ""
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stderr, force=True)
    for name in ("nemovl_train", "data_pipelines"):
        logging.getLogger(name).setLevel(level)
    # Notes of megatron-core's own modules about missing Apex, deprecated names and layouts it computes itself: nothing
    # that a user of a recipe can act on.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")
