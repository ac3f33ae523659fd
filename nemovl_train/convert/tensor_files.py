"""Safetensors folders: reading by name with checks, and writing tensor by tensor with deterministic bytes.

The file format is public (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
padded with spaces to 8 bytes, then the tensors' raw bytes. All sizes are known beforehand, so a header can be written
first and each tensor put in its place whenever it arrives: one tensor in memory, and bytes that do not depend on order.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemovl_train.convert.mapping import Spec
from nemovl_train.exceptions import ConversionError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# These formats are pickles: reading one runs whatever code it carries.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}


class TensorFolder:
    """The tensors of a Hugging Face folder, by name. Headers are read at once, values when asked for (memory-mapped).

    Args:
        folder: Folder with `model.safetensors`, or shards and their index.
        hashes: Expected SHA-256 of each tensor's bytes; a tensor that differs is refused when it is read.

    Raises:
        ConversionError: No safetensors, a broken file, or an index that does not agree with its shards.
    """

    def __init__(self, folder: Path, *, hashes: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.hashes = dict(hashes or {})
        self.specs: dict[str, Spec] = {}
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = _index(folder)
        for file in sorted(set(index.values())) if index else [SINGLE]:
            self._open(file)
        if index and index != self._file_of:
            wrong = sorted(set(index.items()) ^ set(self._file_of.items()))[0]
            raise ConversionError(f"{folder / INDEX} and the shards disagree about tensor {wrong[0]} (in {wrong[1]})")

    def _open(self, file: str) -> None:
        path = self.folder / file
        try:
            handle = safe_open(str(path), framework="pt")
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if name in self._file_of:
                    raise ConversionError(f"tensor {name} is in both {self._file_of[name]} and {file}")
                view = handle.get_slice(name)
                code = view.get_dtype()
                if code not in CODES:
                    raise ConversionError(f"{path}: tensor {name} has unknown format {code}")
                self.specs[name] = Spec(tuple(view.get_shape()), CODES[code])
                self._file_of[name] = file
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} cannot be read as safetensors: {error}; copy the file again") from error
        self._files[file] = handle

    def read(self, name: str) -> Tensor:
        """The tensor of that name; its bytes are hashed first when a hash is known."""
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        expected = self.hashes.get(name)
        if expected is not None and tensor_hash(tensor) != expected:
            raise ConversionError(
                f"{self.folder / self._file_of[name]}: tensor {name} is not the one that was exported (SHA-256 "
                "differs); copy the folder again, or delete nemovl_export.json if the weights were changed on purpose"
            )
        return tensor


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> shard file from the index; empty for a single-file folder."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{folder / INDEX} has no weight_map")
        for file in set(weight_map.values()):
            # A name with a path in it could point anywhere on the reader's disk.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ConversionError(f"{folder / INDEX} names the file {file!r}; expected a plain *.safetensors name")
        return weight_map
    if (folder / SINGLE).is_file():
        return {}
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise ConversionError(
            f"{folder} holds weights as {pickles[0]}, a pickle: loading it could run any code it carries, so it is "
            "never opened; ask its author for safetensors, or convert it on a machine you can afford to lose"
        )
    raise ConversionError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: The file is missing, is not JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    size: int


class ShardWriter:
    """Writes a planned set of tensors into safetensors shards; each may arrive at any time, once.

    Args:
        folder: Existing folder that gets the files.
        plan: Name -> shape and format, in the order of the files.
        max_shard_bytes: A shard is closed before it would grow beyond this many bytes of tensors.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Spec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.plan = dict(plan)
        self.hashes: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self._open_files: dict[str, IO[bytes]] = {}
        shards = _split(self.plan, max_shard_bytes)
        for i, names in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            self._start(file, names)
        if len(shards) > 1:
            total = sum(nbytes(s) for s in self.plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": {n: self._places[n].file for n in self.plan}}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _start(self, file: str, names: Sequence[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        # Wide formats first: every tensor then starts at a multiple of its element size.
        for name in sorted(names, key=lambda n: -self.plan[n].dtype.itemsize):
            spec = self.plan[name]
            end = begin + nbytes(spec)
            header[name] = {"dtype": CODE_OF[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = (self.folder / file).open("wb")
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            offset = 8 + len(text) + header[name]["data_offsets"][0]
            self._places[name] = _Place(file, offset, nbytes(self.plan[name]))
        self._open_files[file] = handle

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor."""
        spec, place = self.plan[name], self._places[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name
        assert name not in self.hashes, name
        data = raw_bytes(tensor)
        handle = self._open_files[place.file]
        handle.seek(place.offset)
        handle.write(data)
        self.hashes[name] = hashlib.sha256(data).hexdigest()

    def close(self) -> None:
        """Flush everything to the disk. Every planned tensor must have been put."""
        assert len(self.hashes) == len(self.plan), sorted(set(self.plan) - set(self.hashes))[:3]
        for handle in self._open_files.values():
            handle.flush()
            os.fsync(handle.fileno())
        self.abandon()

    def abandon(self) -> None:
        """Close the files, complete or not."""
        for handle in self._open_files.values():
            with suppress(OSError):  # what a full disk did not take was reported when it was written
                handle.close()
        self._open_files.clear()


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    count = spec.dtype.itemsize
    for size in spec.shape:
        count *= size
    return count


def _split(plan: Mapping[str, Spec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in plan.items():
        size = nbytes(spec)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
