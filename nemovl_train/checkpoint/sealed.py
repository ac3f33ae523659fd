"""Checkpoints as sealed folders: verified before anything in them is read.

    checkpoints/step_00000100/
      sharded/         tensors and their index (storage.py)
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
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from nemovl_train.checkpoint.files import explain_disk_errors, files_below, fsync, sha256, write_hashed
from nemovl_train.checkpoint.storage import IndexedReader
from nemovl_train.exceptions import CheckpointError
from nemovl_train.parallel import cpu
from nemovl_train.parallel.agree import from_every_rank, on_first_rank
from nemovl_train.parallel.turns import in_turns

cpu.install_if_no_cuda()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import apply_factory_merges  # noqa: E402
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as strategy  # noqa: E402
from megatron.core.dist_checkpointing.utils import extract_sharded_base  # noqa: E402

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
SHARDED = "sharded"
WORK, TRASH = ".writing_", ".discarded_"
_MARKER, _MANIFEST = "COMPLETE", "integrity.json"


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


@dataclass(frozen=True)
class Verified:
    """A checkpoint whose seal and files were checked a moment ago.

    Attributes:
        folder: The checkpoint.
        integrity: Contents of its `integrity.json`.
    """

    folder: Path
    integrity: dict[str, Any]


def step_folder(root: Path, step: int) -> Path:
    """Final folder of a step's checkpoint."""
    return root / f"step_{step:08d}"


def published(root: Path) -> list[Path]:
    """Checkpoint folders of a stage, oldest first; damaged ones included."""
    return sorted(path for path in root.glob("step_*") if path.is_dir()) if root.is_dir() else []


def verify(folder: Path) -> Verified:
    """Check the seal and every file's size and hash. For one process; `verify_together` shares the work.

    Raises:
        DamagedError: Names the first file that is missing, foreign or changed.
    """
    integrity = read_seal(folder)
    for name, entry in integrity["files"].items():
        check_file(folder, name, entry)
    return Verified(folder, integrity)


def verify_together(folder: Path) -> Verified:
    """As `verify`, every file by one rank only. Collective; every rank gets the same outcome."""
    integrity = on_first_rank(lambda: read_seal(folder))
    largest_first = sorted(integrity["files"].items(), key=lambda entry: (-entry[1]["bytes"], entry[0]))
    failure: DamagedError | None = None
    try:
        for name, entry in largest_first[dist.get_rank() :: dist.get_world_size()]:
            check_file(folder, name, entry)
    except DamagedError as error:
        failure = error
    failures = [found for found in from_every_rank(failure) if found is not None]
    if failures:
        raise failures[0]
    return Verified(folder, integrity)


def read_seal(folder: Path) -> dict[str, Any]:
    """Contents of `integrity.json`, after everything but the files' hashes was checked.

    Raises:
        DamagedError: The seal is broken, or files are missing, foreign or of another size.
    """
    marker, manifest = folder / _MARKER, folder / _MANIFEST
    if not marker.is_file() or not manifest.is_file():
        raise DamagedError(f"{folder}: not a complete checkpoint ({marker.name} or {manifest.name} is missing)")
    try:
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
            _check_size(folder / name, entry)
    except OSError as error:
        raise DamagedError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    return integrity


def seal_of(folder: Path) -> str | None:
    """Hash that identifies a published checkpoint with everything in it; None when there is no such checkpoint.

    `verify` says whether it holds.
    """
    marker = folder / _MARKER
    return marker.read_text(encoding="utf-8").strip() if marker.is_file() else None


def check_file(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Compare a file with its entry of `integrity.json`.

    Raises:
        DamagedError: It differs, or cannot be read.
    """
    path = folder / name
    try:
        _check_size(path, entry)
        if sha256(path) != entry["sha256"]:
            raise DamagedError(f"{path}: content changed since it was saved (SHA-256 differs)")
    except OSError as error:
        raise DamagedError(f"{error.filename or path}: cannot be read ({error.strerror})") from error


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    if (size := path.stat().st_size) != entry["bytes"]:
        raise DamagedError(f"{path}: content changed since it was saved ({size} bytes, were {entry['bytes']})")


def latest(root: Path) -> Path | None:
    """Newest checkpoint whose seal holds, with a warning for every newer one that was rejected. For one process."""
    for folder in reversed(published(root)):
        try:
            return verify(folder).folder
        except DamagedError as error:
            log.warning("checkpoint rejected: %s", error)
    return None


def newest(root: Path, *, run_id: str | None = None) -> Verified | None:
    """As `latest`, the work shared by all ranks. Collective.

    Args:
        root: The stage's `checkpoints` folder.
        run_id: When given, a checkpoint of another run is an error instead of a candidate.

    Raises:
        CheckpointError: The newest good one belongs to another run.
    """
    rejected = 0
    for folder in reversed(on_first_rank(lambda: published(root))):
        try:
            found = verify_together(folder)
        except DamagedError as error:
            rejected += 1
            if dist.get_rank() == 0:
                log.warning("checkpoint rejected: %s", error)
            continue
        if run_id is not None and found.integrity["run_id"] != run_id:
            raise CheckpointError(
                f"{folder} belongs to run {found.integrity['run_id']!r}, not {run_id!r}: choose another run.name, "
                "or move the folder away"
            )
        if rejected and dist.get_rank() == 0:
            log.warning("taking %s instead: the newest checkpoint whose seal holds", folder)
        return found
    return None


def load(
    source: Path | Verified,
    *,
    model: ShardedModel,
    optimizer: ShardedOptimizer | None = None,
    nodes_at_once: int = 0,
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, resharding to the current layout. Collective.

    Args:
        source: A published checkpoint; a path is verified first.
        model: Receives the weights, strictly.
        optimizer: Receives its state when given.
        nodes_at_once: Nodes that read at the same time; 0 for all.

    Returns:
        Contents of `state.json`.

    Raises:
        DamagedError: The seal is broken.
        CheckpointError: The tensors are not those of this model.
    """
    folder = (source if isinstance(source, Verified) else verify_together(source)).folder
    sharded: dict[str, Any] = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"], is_loading=True)
    try:
        loaded = in_turns(lambda: read_sharded(sharded, folder / SHARDED), nodes_at_once)
    except (CheckpointingException, CheckpointException, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {last_line(error)}") from error
    model.load_state_dict(loaded["model"], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def read_sharded(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """megatron-core's `dist_checkpointing.load` over our files: its own reader unpickles what it finds.

    Args:
        sharded: Sharded tensors to fill, by name, in sections; what they hold now is written over.
        folder: `sharded` folder of a verified checkpoint.

    Returns:
        The same sections with plain tensors.
    """
    reader = IndexedReader(folder)
    wanted, loaded, factories = load_preprocess(sharded)
    wanted, _ = extract_sharded_base(wanted)
    common = {key: reader.common[key] for key in sharded if key in reader.common}
    merge(common, loaded)
    flat, places, names = strategy._replace_state_dict_keys_with_sharded_keys(wanted)
    tensors = [item for item in nested_values(wanted) if isinstance(item, ShardedTensor)]
    planner = strategy.MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    filled = strategy.mcore_to_pyt_state_dict(flat, True)
    torch_checkpoint.load(filled, storage_reader=reader, planner=planner, no_dist=True)
    by_key = {key: strategy._unwrap_pyt_sharded_tensor(value) for key, value in filled.items()}
    found = strategy._replace_sharded_keys_with_state_dict_keys(by_key, places, names)
    strategy._restore_dict_types(found, wanted)
    merge(common, found)
    return apply_factory_merges(common, factories)


def seal(work: Path, final: Path, *, files: dict[str, Any], texts: dict[str, str], identity: dict[str, Any]) -> None:
    """Make a checkpoint of a folder whose large files are written: small files, hashes, marker, rename.

    Args:
        work: The hidden folder.
        final: The name it gets.
        files: Entries of `integrity.json` of the files that are there, by path.
        texts: Contents of the small files, by path.
        identity: Run and step.

    Raises:
        CheckpointError: The disk is full, or the folder cannot be written.
    """
    with explain_disk_errors(work.parent):
        entries = files | {name: write_hashed(work / name, text) for name, text in texts.items()}
        manifest = {"format_version": FORMAT_VERSION, **identity, "files": dict(sorted(entries.items()))}
        written = write_hashed(work / _MANIFEST, json.dumps(manifest, indent=1))
        write_hashed(work / _MARKER, f"{written['sha256']}\n")
        for folder in (work / SHARDED, work):
            fsync(folder)
        if final.exists():
            # Only a checkpoint that failed verification is written again: the run restarted from an older one.
            discard([final])
        os.rename(work, final)
        fsync(final.parent)


def discard(folders: Iterable[Path]) -> None:
    """Remove checkpoints so that a death halfway never leaves something that looks published."""
    for folder in folders:
        trash = folder.with_name(f"{TRASH}{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what saves and deletions left behind that were cut off. For the process that owns the stage."""
    for leftover in (*root.glob(f"{WORK}*"), *root.glob(f"{TRASH}*")):
        log.info("removing %s, which an interrupted run left behind", leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def last_line(error: BaseException) -> str:
    """The message proper: what other ranks raised comes with their tracebacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
