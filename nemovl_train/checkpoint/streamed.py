"""Checkpoints written and read one tensor at a time, for what never holds a whole model: conversions.

The files are those of a training run's checkpoint: PyTorch's distributed format with megatron-core's two additions, an
(empty) object `common_state` and `metadata.json` (megatron-core `dist_checkpointing/serialization.py`). Tensors are
stored whole, so any layout loads them.
"""

from __future__ import annotations

import io
import json
import queue
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from nemovl_train.checkpoint.plain_metadata import refuse_code
from nemovl_train.checkpoint.sealed import publish, verify

FILE_BYTES = 5 * 10**9
_COMMON = "common_state/shard_0_1"
_MEGATRON = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Plans with the shapes of meta tensors; asks for a tensor's values when its turn to be written comes."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        name = write_item.index.fqn
        planned, tensor = self.state_dict[name], self._read(name)
        assert (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype), name
        return tensor


class _SerialWriter(FileSystemWriter):
    """One file after the other, each begun when the one before has reached its size. One thread, one tensor."""

    def __init__(self, path: Path) -> None:
        # No copies from a device are made ahead: every one would be a further tensor in memory.
        super().__init__(path, thread_count=1, per_thread_copy_ahead=0)

    def storage_meta(self) -> None:
        """Nothing: it would be the folder's path on this machine."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        files: list[list[WriteItem]] = [[]]
        filled = 0
        for item in plan.items:
            size = 0 if item.tensor_data is None else item.tensor_data.size.numel() * _itemsize(item)
            if files[-1] and filled + size > FILE_BYTES:
                files.append([])
                filled = 0
            files[-1].append(item)
            filled += size
        waiting: queue.Queue = queue.Queue()
        for number, items in enumerate(files):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            waiting.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, waiting)


def _itemsize(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype.itemsize


def save_streamed(
    root: Path,
    step: int,
    *,
    specs: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    state: dict[str, Any],
    run_id: str,
) -> Path:
    """As `sealed.save` for weights alone, with one tensor in memory at a time. For one process.

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

    def write(folder: Path) -> None:
        common = io.BytesIO()
        torch.save([{}], common)
        planner = _ReadWhenWritten(read)
        with _one_process():
            dcp.save({_COMMON: common, **specs}, storage_writer=_SerialWriter(folder), planner=planner, no_dist=True)
        (folder / "metadata.json").write_text(json.dumps(_MEGATRON), encoding="utf-8")

    return publish(root, step, write, state=state, run_id=run_id)


@contextmanager
def _one_process() -> Iterator[None]:
    """Without PyTorch's reminder that the other ranks take no part: there are none, or it is meant so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class StoredTensors:
    """The tensors of a checkpoint, whatever layout saved it, read when asked for. For one process; needs no groups.

    Args:
        folder: A published checkpoint.
        verified: Its seal was verified a moment ago; otherwise it is verified now.

    Attributes:
        specs: Name in the checkpoint -> tensor on the meta device.

    Raises:
        CheckpointError: The seal is broken, or the checkpoint carries code.
    """

    def __init__(self, folder: Path, *, verified: bool = False) -> None:
        if not verified:
            verify(folder)
        refuse_code(folder)
        self._reader = _Reader(folder / "sharded")
        entries = self._reader.read_metadata().state_dict_metadata
        self.specs = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        tensor = torch.empty_like(self.specs[name], device="cpu")
        with _one_process():
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


class _Reader(FileSystemReader):
    """Reads the table of contents once, not for every tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._contents: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._contents is None:
            self._contents = super().read_metadata(*args, **kwargs)
        return self._contents
