"""How tensors lie in a checkpoint: one file of plain bytes a rank, and a JSON index of what is where.

    rank_00000.bin   tensors one after the other, as they lie in memory (little endian, row major)
    index.json       dtype, shape and pieces of every tensor; objects; what is the same on every rank

PyTorch's distributed checkpoint plans what each rank writes and reads, so that a checkpoint can be loaded into another
layout. Its own file format is not used: it pickles the index and every tensor, and reading a pickle can run code.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from nemovl_train.exceptions import CheckpointError

INDEX = "index.json"
_SLAB_BYTES = 1 << 26  # a power of two: PyTorch's page-locked allocator rounds up to one


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.bin"


class HostStage:
    """Host memory between a rank's tensors and its file.

    `fill` takes one copy of all of them, so that training goes on while it is written; the memory is kept for the next
    save. `through` is for a save that is waited for, and needs one block.

    Args:
        pinned: Page-locked memory: copies from a GPU are several times faster.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._slabs: list[torch.Tensor] = []
        self.bytes = 0

    @property
    def held_bytes(self) -> int:
        """Size of the host memory: that of the largest file so far, rounded up to whole slabs."""
        return len(self._slabs) * _SLAB_BYTES

    def fill(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the bytes of tensors one after the other. They may change as soon as this returns."""
        self.bytes = 0
        for data in _as_bytes(tensors):
            done = 0
            while done < data.numel():
                number, begin = divmod(self.bytes, _SLAB_BYTES)
                count = min(data.numel() - done, _SLAB_BYTES - begin)
                slab = self._slab(number)[begin : begin + count]
                slab.copy_(data[done : done + count], non_blocking=self._pinned)
                self.bytes, done = self.bytes + count, done + count
        if self._pinned:
            torch.cuda.current_stream().synchronize()

    def blocks(self) -> Iterator[memoryview]:
        """What `fill` took, in pieces that cost no copy."""
        for number, slab in enumerate(self._slabs):
            count = min(self.bytes - number * _SLAB_BYTES, _SLAB_BYTES)
            if count > 0:
                yield memoryview(slab.numpy())[:count]

    def through(self, tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
        """The bytes of tensors that do not change meanwhile; a piece is valid until the next one."""
        for data in _as_bytes(tensors):
            for begin in range(0, data.numel(), _SLAB_BYTES):
                piece = data[begin : begin + _SLAB_BYTES]
                if piece.device.type != "cpu":
                    slab = self._slab(0)[: piece.numel()]
                    slab.copy_(piece)
                    piece = slab
                yield memoryview(piece.numpy())

    def _slab(self, number: int) -> torch.Tensor:
        if number == len(self._slabs):
            self._slabs.append(torch.empty(_SLAB_BYTES, dtype=torch.uint8, pin_memory=self._pinned))
        return self._slabs[number]


def _as_bytes(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class PlannedFile:
    """Takes part in PyTorch's planning of a save as its storage: what this rank's file will hold, and where.

    Attributes:
        entries: This rank's rows of the index: tensors by key, and objects by key.
        tensors: What the file consists of, in order.
    """

    can_run_decentralized_global_plan = True

    def __init__(self, rank: int) -> None:
        self.file = rank_file(rank)
        self.entries: dict[str, dict[str, Any]] = {"tensors": {}, "objects": {}}
        self.tensors: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Nothing to set up: files are written after the planning."""

    def prepare_local_plan(self, plan: Any) -> Any:
        """The plan as it is."""
        return plan

    def prepare_decentralized_global_plan(self, plan: Any) -> Any:
        """The plan as it is: file names follow from ranks."""
        return plan

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Lay out the file. Tensors are only referred to."""
        position = 0
        for item in plan.items:
            data = planner.resolve_data(item)
            key = item.index.fqn
            if item.type == WriteItemType.BYTE_IO:
                data = torch.frombuffer(bytearray(data.getbuffer()), dtype=torch.uint8)
                self.entries["objects"][key] = {"file": self.file, "start": position, "bytes": data.nbytes}
            else:
                tensor = self.entries["tensors"].setdefault(
                    key, {"dtype": _name(data.dtype), "shape": list(item.tensor_data.size), "pieces": []}
                )
                chunk = item.tensor_data.chunk
                tensor["pieces"].append([list(chunk.offsets), list(chunk.sizes), self.file, position])
            self.tensors.append(data)
            position += data.nbytes


def join_index(parts: Iterable[dict[str, Any]], common: Any) -> str:
    """The index of all ranks' entries as JSON.

    Args:
        parts: `PlannedFile.entries` of every rank.
        common: What is the same on every rank: plain values, and small tensors.

    Raises:
        AssertionError: The pieces do not make up a tensor.
    """
    index: dict[str, Any] = {"common": _plain(common), "tensors": {}, "objects": {}}
    for part in parts:
        index["objects"].update(part["objects"])
        for key, tensor in part["tensors"].items():
            known = index["tensors"].setdefault(key, {**tensor, "pieces": []})
            assert (known["dtype"], known["shape"]) == (tensor["dtype"], tensor["shape"]), key
            known["pieces"] += tensor["pieces"]
    for key, tensor in index["tensors"].items():
        assert sum(math.prod(sizes) for _, sizes, _, _ in tensor["pieces"]) == math.prod(tensor["shape"]), key
    return json.dumps(index, separators=(",", ":"))


class _Place(NamedTuple):
    """Where a piece of a tensor, or an object of `sizes[0]` bytes, lies."""

    file: str
    start: int
    sizes: list[int]
    dtype: torch.dtype


class IndexedReader(StorageReader):
    """Reads what `PlannedFile` laid out: of every piece only the rows that are needed.

    Args:
        folder: Folder of `index.json` and the ranks' files.

    Raises:
        CheckpointError: The index is not one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.common = _from_plain(index["common"])
            self.places = dict(_places(index))
            self.metadata = _metadata(index, self.places)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy the checkpoint again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not the index of a checkpoint ({error!r})") from error

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in PyTorch's terms."""
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any folder may be one."""
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the plan's tensors and objects, file by file and front to back."""
        wanted = [(self.places[item.storage_index.fqn, _offset(item)], item) for item in plan.items]
        by_file: dict[str, list[tuple[_Place, ReadItem]]] = {}
        for place, item in sorted(wanted, key=lambda pair: (pair[0].file, pair[0].start)):
            by_file.setdefault(place.file, []).append((place, item))
        for name, items in by_file.items():
            with (self.folder / name).open("rb") as file:
                for place, item in items:
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, io.BytesIO(self._object(file, place, item.storage_index.fqn)))
                    else:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(_read_rows(file, place, item.storage_offsets, item.lengths))
                        planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _object(self, file: BinaryIO, place: _Place, key: str) -> bytes:
        """Bytes of an object, seen to name nothing that could run: PyTorch opens it without a look."""
        data = bytes(_read(file, place.start, place.sizes[0]))
        try:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle can be broken in any way
            raise CheckpointError(
                f"{file.name}: the object {key} is not plain data: {_reason(error)}. Loading it could run code, so it "
                "was not opened; use a checkpoint that nemovl wrote, or ask its author for a Hugging Face folder "
                "(`nemovl convert export`)"
            ) from error
        return data


def _offset(item: ReadItem) -> tuple[int, ...] | None:
    return None if item.type == LoadItemType.BYTE_IO else tuple(item.storage_index.offset or ())


def _places(index: dict[str, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], _Place]]:
    for key, tensor in index["tensors"].items():
        dtype = _dtype(tensor["dtype"])
        for offsets, sizes, file, start in tensor["pieces"]:
            yield (key, tuple(offsets)), _Place(_plain_name(file), int(start), [int(n) for n in sizes], dtype)
    for key, entry in index["objects"].items():
        place = _Place(_plain_name(entry["file"]), int(entry["start"]), [int(entry["bytes"])], torch.uint8)
        yield (key, None), place


def _metadata(index: dict[str, Any], places: dict[tuple[str, tuple[int, ...] | None], _Place]) -> Metadata:
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in index["objects"]}
    for key, tensor in index["tensors"].items():
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s, _, _ in tensor["pieces"]]
        properties = TensorProperties(dtype=_dtype(tensor["dtype"]))
        entries[key] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
    return Metadata(
        entries, storage_data={MetadataIndex(key, offset): place for (key, offset), place in places.items()}
    )


def _read_rows(file: BinaryIO, place: _Place, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    """A block of a piece: its rows are read whole, columns that are not wanted are dropped after."""
    if 0 in lengths:
        return torch.empty(lengths, dtype=place.dtype)
    rest = place.sizes[1:]
    row = math.prod(rest) * place.dtype.itemsize
    first, count = (offsets[0], lengths[0]) if place.sizes else (0, 1)
    data = _read(file, place.start + first * row, count * row)
    block = torch.frombuffer(data, dtype=place.dtype).view([count, *rest] if place.sizes else [])
    for dim in range(1, len(place.sizes)):
        block = block.narrow(dim, offsets[dim], lengths[dim])
    return block


def _read(file: BinaryIO, start: int, count: int) -> bytearray:
    data = bytearray(count)
    file.seek(start)
    view = memoryview(data)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(f"{file.name} ends {len(view)} bytes early; copy the checkpoint again")
        view = view[got:]
    return data


def _plain_name(name: Any) -> str:
    # A name with a path in it could point anywhere on the reader's disk.
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"names the file {name!r}; expected a plain name in the same folder")
    return name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is not a dtype")
    return found


def _plain(value: Any) -> Any:
    """JSON for nested dicts, lists, tuples, plain values and small tensors; `_from_plain` undoes it."""
    if isinstance(value, dict):
        return {"items": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), "dtype": _name(value.dtype)}
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} has no place in a checkpoint"
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {_from_plain(key): _from_plain(item) for key, item in value["items"]}
    if "tuple" in value:
        return tuple(_from_plain(item) for item in value["tuple"])
    return torch.tensor(value["tensor"], dtype=_dtype(value["dtype"]))


def _reason(error: Exception) -> str:
    """The line that names the global: torch.load wraps it in advice on how to run the code after all."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0].rstrip(".")
