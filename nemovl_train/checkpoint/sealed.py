"""Checkpoints as sealed folders: written beside, hashed, marked complete, then renamed into place.

    checkpoints/step_00000100/
      sharded/         tensors, by megatron-core's distributed checkpointing
      state.json       TrainState
      integrity.json   run id, step, size and SHA-256 of every file above
      COMPLETE         hash of integrity.json; written last

A folder without a valid seal is never read. Publishing is one rename, so a process that dies at any point leaves the
previous checkpoint, or the new one, but never half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from nemovl_train.exceptions import CheckpointError
from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core import dist_checkpointing  # noqa: E402

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_HASH_BLOCK = 1 << 22


class ShardedModel(Protocol):
    """What saving and loading need of a model."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Sharded tensors by name."""

    def load_state_dict(self, state_dict: dict, strict: bool = True) -> Any:
        """Take over the tensors."""


class ShardedOptimizer(Protocol):
    """What saving and loading need of the optimizers."""

    def sharded_state_dict(self, model_state: dict, *, is_loading: bool = False) -> dict:
        """Sharded optimizer state that belongs to `model_state`."""

    def load_state_dict(self, state: dict) -> None:
        """Take over the state."""


def step_folder(root: Path, step: int) -> Path:
    """Final folder of a step's checkpoint."""
    return root / f"step_{step:08d}"


def save(
    root: Path,
    step: int,
    *,
    model: ShardedModel,
    optimizer: ShardedOptimizer | None,
    state: dict[str, Any],
    run_id: str,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write, seal and publish one checkpoint. Collective: every rank calls it.

    Args:
        root: The stage's `checkpoints` folder.
        step: Optimiser steps done.
        model: Source of the weights.
        optimizer: Source of the optimizer state; None saves weights only.
        state: Contents of `state.json`.
        run_id: Identity of the run, checked on load.
        metadata: Passed to the model's `sharded_state_dict`.

    Returns:
        The published folder.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; the previous checkpoint is untouched.
    """
    final, work = step_folder(root, step), root / f".writing_step_{step:08d}"
    sharded = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"])
    _on_rank_zero(lambda: _prepare(work), work)
    with _explain_disk_errors(work):
        dist_checkpointing.save(sharded, str(work / "sharded"))
    dist.barrier()
    _on_rank_zero(lambda: _seal(work, final, state, {"run_id": run_id, "step": step}), work)
    return final


def load(
    folder: Path,
    *,
    model: ShardedModel,
    optimizer: ShardedOptimizer | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, resharding to the current layout. Collective.

    Args:
        folder: A published checkpoint; its seal is verified first.
        model: Receives the weights, strictly.
        optimizer: Receives its state when given.
        metadata: Passed to the model's `sharded_state_dict`.

    Returns:
        Contents of `state.json`.
    """
    verify(folder)
    sharded = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"], is_loading=True)
    loaded = dist_checkpointing.load(sharded, str(folder / "sharded"))
    model.load_state_dict(loaded["model"], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return json.loads((folder / "state.json").read_text())


def verify(folder: Path) -> dict[str, Any]:
    """Check the seal and every file's size and hash.

    Returns:
        Contents of `integrity.json`.

    Raises:
        CheckpointError: Names the first file that is missing, foreign or changed.
    """
    marker, manifest = folder / "COMPLETE", folder / "integrity.json"
    if not marker.is_file() or not manifest.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint ({marker.name} or {manifest.name} is missing)")
    if marker.read_text().strip() != _sha256(manifest):
        raise CheckpointError(f"{manifest}: does not match its seal")
    integrity = json.loads(manifest.read_text())
    if integrity.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{manifest}: checkpoint format {integrity.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    found = {str(path.relative_to(folder)) for path in _files(folder)} - {marker.name, manifest.name}
    if found != set(integrity["files"]):
        raise CheckpointError(f"{folder}: missing or foreign files {sorted(found ^ set(integrity['files']))}")
    for name, entry in integrity["files"].items():
        path = folder / name
        if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: content changed since it was saved (SHA-256 differs)")
    return integrity


def published(root: Path) -> list[Path]:
    """Checkpoint folders of a stage, oldest first; damaged ones included."""
    return sorted(path for path in root.glob("step_*") if path.is_dir()) if root.is_dir() else []


def latest(root: Path, *, run_id: str | None = None) -> Path | None:
    """Newest checkpoint whose seal holds, with a warning for every newer one that was rejected.

    Args:
        root: The stage's `checkpoints` folder.
        run_id: When given, a checkpoint of another run is an error instead of a candidate.
    """
    for folder in reversed(published(root)):
        try:
            integrity = verify(folder)
        except CheckpointError as error:
            log.warning("checkpoint rejected: %s", error)
            continue
        if run_id is not None and integrity["run_id"] != run_id:
            raise CheckpointError(
                f"{folder} belongs to run {integrity['run_id']!r}, not {run_id!r}: choose another run.name, "
                "or move the folder away"
            )
        return folder
    return None


def retain(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, on rank 0. The newest is verified before anything goes."""
    if dist.get_rank() == 0:
        folders = published(root)
        if len(folders) > keep_last:
            verify(folders[-1])
            for folder in folders[:-keep_last]:
                _discard(folder)
    dist.barrier()


def _prepare(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)
    (work / "sharded").mkdir(parents=True)


def _seal(work: Path, final: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    _write(work / "state.json", json.dumps(state, indent=1, sort_keys=True))
    files = {
        str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in _files(work)
    }
    for path in _files(work):
        _fsync(path)
    manifest = work / "integrity.json"
    _write(manifest, json.dumps({"format_version": FORMAT_VERSION, **identity, "files": files}, indent=1))
    _write(work / "COMPLETE", _sha256(manifest) + "\n")
    for folder in (work / "sharded", work):
        _fsync(folder)
    if final.exists():
        # Only a checkpoint that failed verification is written again: the run restarted from an older one.
        _discard(final)
    os.rename(work, final)
    _fsync(final.parent)


def _discard(folder: Path) -> None:
    """Remove a folder so that a death halfway never leaves something that looks published."""
    trash = folder.with_name(f".discarded_{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _on_rank_zero(action: Callable[[], None], where: Path) -> None:
    """Run file work on one rank and let every rank share its outcome, so that none waits for a dead one."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            with _explain_disk_errors(where):
                action()
        except CheckpointError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])


@contextmanager
def _explain_disk_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(where)).free
            raise CheckpointError(
                f"no space left for a checkpoint in {where.parent} ({free / 2**30:.2f} GiB free): earlier checkpoints "
                "are intact; free space and run the same command again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise CheckpointError(f"{where.parent} is not writable ({error.strerror}): choose another run.root") from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
