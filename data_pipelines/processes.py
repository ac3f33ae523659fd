"""Worker processes of the data verbs: one thread each, gone as soon as their parent is."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def process_pool(workers: int, start: Callable[..., None], *args: Any) -> ProcessPoolExecutor:
    """A pool of spawned processes, each of which first calls `start(*args)`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(start, args))


def in_order[T, R](
    pool: ProcessPoolExecutor, work: Callable[[T], R], items: Iterable[T], *, ahead: int
) -> Iterator[tuple[T, R]]:
    """Items with what `work` makes of them, in their order; at most `ahead` of them wait or are done early.

    Not all at once: millions of futures would be built before the first is done.
    """
    running: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        if len(running) >= ahead:
            done, future = running.popleft()
            yield done, future.result()
        running.append((item, pool.submit(work, item)))
    for done, future in running:
        yield done, future.result()


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
