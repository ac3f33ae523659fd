"""When one process of a run ends, the others say so in one sentence instead of a traceback of their collective."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from nemovl_train.exceptions import RunFailedError, UserError

_KEY = "nemovl_first_failure"
_WAIT_SECONDS = 2.0  # for the process that failed first to say why
# How gloo's and NCCL's errors of a peer that went away, or of a store that did, read.
_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "timed out", "NCCL error")


@contextmanager
def explained() -> Iterator[None]:
    """Tell the other ranks why this one ends, or say which one's end was the reason.

    Raises:
        RunFailedError: Another process ended first.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError | RunFailedError) and _is_lost(error):
            raise RunFailedError(_cause(error)) from error
        _tell(error)
        raise


def _is_lost(error: Exception) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def _tell(error: Exception) -> None:
    store = shared_store()
    if store is not None:
        text = (str(error).strip().splitlines() or [""])[0]
        _quietly(lambda: store.compare_set(_KEY, "", f"rank {dist.get_rank()}: {type(error).__name__}: {text}"))


def _cause(error: Exception) -> str:
    store, end = shared_store(), time.monotonic() + _WAIT_SECONDS
    while store is not None and time.monotonic() < end:
        if _quietly(lambda: store.check([_KEY])):
            return f"ended because another process did. {store.get(_KEY).decode()}"
        time.sleep(0.05)
    first = str(error).strip().splitlines()[0][:200]
    return (
        "ended because another process did, without a word: it was killed, ran out of memory or lost its machine. Its "
        f"own output, or the scheduler's, may say more (here: {first}). Run the same command again: it continues from "
        "the last checkpoint"
    )


def shared_store() -> dist.Store | None:
    """Where the processes of a run met; None for a run of one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def _quietly(action: object) -> bool:
    """The store may have gone with its process; then nothing can be told."""
    try:
        return bool(action())  # type: ignore[operator]
    except Exception:
        return False
