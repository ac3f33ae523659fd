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

import json
import logging
import os
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from nemovl_train.checkpoint.files import explain_disk_errors, files_below, fsync, no_space, sha256
from nemovl_train.checkpoint.plain_metadata import refuse_code
from nemovl_train.exceptions import CheckpointError
from nemovl_train.parallel import cpu
from nemovl_train.parallel.agree import on_first_rank

cpu.install_if_no_cuda()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

log = logging.getLogger(__name__)

# A save is synchronous here: its writers are threads of this process. For their results megatron-core would start a
# manager process, which imports everything again and outlives a run that was killed.
filesystem_async._results_queue = queue.Queue()

FORMAT_VERSION = 1
_WORK, _TRASH = ".writing_", ".discarded_"
_PROBE_BYTES = 1 << 20


class DamagedError(CheckpointError):
    """A checkpoint that is incomplete, or not as it was sealed."""


class ShardedModel(Protocol):
    """What saving and loading need of a model."""

    def sharded_state_dict(self) -> dict:
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
) -> Path:
    """Write, seal and publish one checkpoint. Collective: every rank calls it.

    Args:
        root: The stage's `checkpoints` folder.
        step: Optimiser steps done.
        model: Source of the weights.
        optimizer: Source of the optimizer state; None saves weights only.
        state: Contents of `state.json`.
        run_id: Identity of the run, checked on load.

    Returns:
        The published folder.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; the previous checkpoint is untouched.
    """
    final = step_folder(root, step)
    work = root / f"{_WORK}{final.name}"
    sharded = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"])
    try:
        on_first_rank(lambda: _prepare(work))
        # Every rank comes out of this with the same outcome: the writers' results are shared, a barrier ends it.
        with _explain_writer_errors(work):
            dist_checkpointing.save(sharded, str(work / "sharded"))
        on_first_rank(lambda: _seal(work, final, state, {"run_id": run_id, "step": step}))
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)  # on a full disk others need the space that half of it takes
        raise
    return final


def load(
    folder: Path,
    *,
    model: ShardedModel,
    optimizer: ShardedOptimizer | None = None,
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, resharding to the current layout. Collective.

    Args:
        folder: A published checkpoint; its seal is verified first.
        model: Receives the weights, strictly.
        optimizer: Receives its state when given.

    Returns:
        Contents of `state.json`.

    Raises:
        DamagedError: The seal is broken.
        CheckpointError: The tensors are not those of this model.
    """
    on_first_rank(lambda: verify(folder))
    # A seal says that nothing changed since it was made, not who made it.
    on_first_rank(lambda: refuse_code(folder))
    sharded = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"], is_loading=True)
    try:
        loaded = dist_checkpointing.load(sharded, str(folder / "sharded"))
    except (CheckpointingException, CheckpointException) as error:
        raise CheckpointError(f"{folder} does not fit this model: {_last_line(error)}") from error
    model.load_state_dict(loaded["model"], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return json.loads((folder / "state.json").read_text())


def verify(folder: Path) -> dict[str, Any]:
    """Check the seal and every file's size and hash.

    Returns:
        Contents of `integrity.json`.

    Raises:
        DamagedError: Names the first file that is missing, foreign or changed.
    """
    marker, manifest = folder / "COMPLETE", folder / "integrity.json"
    if not marker.is_file() or not manifest.is_file():
        raise DamagedError(f"{folder}: not a complete checkpoint ({marker.name} or {manifest.name} is missing)")
    try:
        return _verify_sealed(folder, marker, manifest)
    except OSError as error:
        raise DamagedError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error


def _verify_sealed(folder: Path, marker: Path, manifest: Path) -> dict[str, Any]:
    if marker.read_bytes().strip() != sha256(manifest).encode():
        raise DamagedError(f"{manifest}: does not match its seal in {marker.name}")
    integrity = json.loads(manifest.read_text(encoding="utf-8"))
    if integrity.get("format_version") != FORMAT_VERSION:
        raise DamagedError(
            f"{manifest}: checkpoint format {integrity.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    found = {str(path.relative_to(folder)) for path in files_below(folder)} - {marker.name, manifest.name}
    if found != set(integrity["files"]):
        raise DamagedError(f"{folder}: missing or foreign files {sorted(found ^ set(integrity['files']))}")
    for name, entry in integrity["files"].items():
        path = folder / name
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise DamagedError(f"{path}: content changed since it was saved (SHA-256 differs)")
    return integrity


def seal(folder: Path) -> str:
    """Hash that identifies a published checkpoint with everything in it; `verify` says whether it holds."""
    return (folder / "COMPLETE").read_text(encoding="utf-8").strip()


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
        except DamagedError as error:
            log.warning("checkpoint rejected: %s", error)
            continue
        if run_id is not None and integrity["run_id"] != run_id:
            raise CheckpointError(
                f"{folder} belongs to run {integrity['run_id']!r}, not {run_id!r}: choose another run.name, "
                "or move the folder away"
            )
        return folder
    return None


def retain(newest: Path, keep_last: int) -> None:
    """Delete all but `keep_last` checkpoints, counted from one that was just published. Collective.

    Args:
        newest: The checkpoint that was just published; it is verified before anything goes. Later ones are what a
            restart rejected: they neither count nor go, and are replaced when the run reaches their step.
        keep_last: How many stay.
    """
    on_first_rank(lambda: _retain(newest, keep_last))


def _retain(newest: Path, keep_last: int) -> None:
    folders = [folder for folder in published(newest.parent) if folder.name <= newest.name]
    if len(folders) > keep_last:
        verify(newest)
        for folder in folders[:-keep_last]:
            _discard(folder)


def clean(root: Path) -> None:
    """Remove what saves and deletions left behind that were cut off. For the process that owns the stage."""
    for leftover in (*root.glob(f"{_WORK}*"), *root.glob(f"{_TRASH}*")):
        log.info("removing %s, which an interrupted run left behind", leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def _prepare(work: Path) -> None:
    with explain_disk_errors(work.parent):
        if work.exists():
            shutil.rmtree(work)
        (work / "sharded").mkdir(parents=True)


def _seal(work: Path, final: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    with explain_disk_errors(work.parent):
        _write(work / "state.json", json.dumps(state, indent=1, sort_keys=True))
        paths = files_below(work)
        for path in paths:
            fsync(path)
        files = {str(p.relative_to(work)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}
        manifest = work / "integrity.json"
        _write(manifest, json.dumps({"format_version": FORMAT_VERSION, **identity, "files": files}, indent=1))
        _write(work / "COMPLETE", sha256(manifest) + "\n")
        for folder in (work / "sharded", work):
            fsync(folder)
        if final.exists():
            # Only a checkpoint that failed verification is written again: the run restarted from an older one.
            _discard(final)
        os.rename(work, final)
        fsync(final.parent)


def _discard(folder: Path) -> None:
    """Remove a folder so that a death halfway never leaves something that looks published."""
    trash = folder.with_name(f"{_TRASH}{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def _explain_writer_errors(work: Path) -> Iterator[None]:
    """Say why megatron-core's writers failed. They lose the system's error on the way, so a probe asks again."""
    try:
        with explain_disk_errors(work.parent):
            yield
    except CheckpointException as error:
        try:
            (work / "probe").write_bytes(bytes(_PROBE_BYTES))
        except OSError as refused:
            raise CheckpointError(f"{no_space(work.parent)} ({refused.strerror})") from error
        raise CheckpointError(
            f"the checkpoint {work} could not be written, though the disk takes files: earlier checkpoints are intact; "
            f"the writer said: {_last_line(error)}"
        ) from error


def _last_line(error: BaseException) -> str:
    """The message proper: what other ranks raised comes with their tracebacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fsync(path)
