"""Checkpoints written and read one tensor at a time, for what never holds a whole model: conversions.

The files are those of a training run's checkpoint (`storage.py`), every tensor in one piece, so any layout loads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.files import HashedFile, explain_disk_errors
from nemovl_train.checkpoint.sealed import SHARDED, WORK, Verified
from nemovl_train.checkpoint.storage import INDEX, IndexedReader, join_index, rank_file

FILE_BYTES = 5 * 10**9


def save_streamed(
    root: Path,
    step: int,
    *,
    specs: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    state: dict[str, Any],
    run_id: str,
) -> Path:
    """Write, seal and publish weights alone, with one tensor in memory at a time. For one process; needs no groups.

    Args:
        root: The `checkpoints` folder.
        step: Number of the checkpoint.
        specs: Name in the checkpoint -> tensor on the meta device; they are written in this order.
        read: Gives the tensor of a name, on the CPU, with that shape and dtype; called once for each.
        state: Contents of `state.json`.
        run_id: Identity of the run.

    Returns:
        The published folder.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written.
    """
    final = sealed.step_folder(root, step)
    work = root / f"{WORK}{final.name}"
    try:
        with explain_disk_errors(root):
            shutil.rmtree(work, ignore_errors=True)
            (work / SHARDED).mkdir(parents=True)
            files, tensors = _write(work / SHARDED, specs, read)
        texts = {
            f"{SHARDED}/{INDEX}": join_index([{"tensors": tensors, "objects": {}}], {}),
            "state.json": json.dumps(state, indent=1, sort_keys=True),
        }
        sealed.seal(work, final, files=files, texts=texts, identity={"run_id": run_id, "step": step})
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # others need the space that half of it takes
        raise
    return final


def _write(
    folder: Path, specs: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The large files, each begun when the one before has reached its size: their entries, and rows of the index."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    file = HashedFile(folder / rank_file(0))
    try:
        for name, spec in specs.items():
            if file.bytes and file.bytes + spec.nbytes > FILE_BYTES:
                files[f"{SHARDED}/{file.path.name}"] = file.close()
                file = HashedFile(folder / rank_file(len(files)))
            tensors[name] = {
                "dtype": str(spec.dtype).removeprefix("torch."),
                "shape": list(spec.shape),
                "pieces": [[[0] * spec.dim(), list(spec.shape), file.path.name, file.bytes]],
            }
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (spec.shape, spec.dtype), name
            file.write(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
            del tensor  # before the next is read
    finally:
        files[f"{SHARDED}/{file.path.name}"] = file.close()
    return files, tensors


class StoredTensors:
    """The tensors of a checkpoint, whatever layout saved it, read when asked for. For one process; needs no groups.

    Args:
        source: A published checkpoint; a path is verified first.

    Attributes:
        specs: Name in the checkpoint -> tensor on the meta device.

    Raises:
        CheckpointError: The seal is broken, or the checkpoint's index is none.
    """

    def __init__(self, source: Path | Verified) -> None:
        found = source if isinstance(source, Verified) else sealed.verify(source)
        self._reader = IndexedReader(found.folder / SHARDED)
        self.specs = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        tensor = torch.empty_like(self.specs[name], device="cpu")
        # `torch.distributed.checkpoint.load` for one process, without its talk to other ranks.
        plan = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        plan.set_up_planner({name: tensor}, self._reader.read_metadata(), is_coordinator=True)
        self._reader.read_data(plan.create_local_plan(), plan).wait()
        return tensor
