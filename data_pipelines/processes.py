"""Worker processes of the data verbs: one thread each, gone as soon as their parent is."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def process_pool(workers: int, start: Callable[..., None], *args: Any) -> ProcessPoolExecutor:
    """A pool of spawned processes, each of which first calls `start(*args)`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(start, args))


def _prepare(start: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None
    # A killed parent closes nothing that a worker waits for: without this it would wait for ever.
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start(*args)


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
