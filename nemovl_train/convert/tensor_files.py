"""Safetensors folders: reading by name with checks, and writing shard by shard with deterministic bytes.

The file format is public (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
padded with spaces to 8 bytes, then the tensors' raw bytes. All sizes are known beforehand, so a header can be written
first. Both ways one tensor is in memory; files are read, not mapped, so that no page of them counts as ours.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemovl_train.convert import fp8
from nemovl_train.convert.lazy import Spec, Tensors
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
    """The tensors of a Hugging Face folder, by name. Headers are read at once, values when asked for.

    FP8 weights come out multiplied by their scales, in the format of the folder's other weights.

    Args:
        folder: Folder with `model.safetensors`, or shards and their index.
        hashes: Expected SHA-256 of each tensor's bytes; a tensor that differs is refused when it is read.

    Attributes:
        specs: Shape and format of each tensor, as it comes out.
        stored: The same as the files hold it, scales included.
        fp8: Scales of the FP8 weights, both by name.

    Raises:
        ConversionError: No safetensors, a broken file, or an index that does not agree with its shards.
    """

    def __init__(self, folder: Path, *, hashes: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.hashes = dict(hashes or {})
        self.stored: dict[str, Spec] = {}
        self._place: dict[str, tuple[str, int]] = {}
        index = _index(folder)
        for file in sorted(set(index.values())) if index else [SINGLE]:
            self._open(file)
        found = {name: file for name, (file, _) in self._place.items()}
        if index and index != found:
            wrong = sorted(set(index.items()) ^ set(found.items()))[0]
            raise ConversionError(f"{folder / INDEX} and the shards disagree about tensor {wrong[0]} (in {wrong[1]})")
        self.fp8 = fp8.quantized_weights(self.stored)
        self._wide = fp8.widest_format(self.stored)
        self.specs = dict(self.stored)
        for name, scale in self.fp8.items():
            self.specs[name] = Spec(self.stored[name].shape, self._wide)
            for left_out in (scale, fp8.activation_scale_name(name)):
                self.specs.pop(left_out, None)

    def _open(self, file: str) -> None:
        path = self.folder / file
        try:
            with safe_open(str(path), framework="pt"):  # checks the header and that the file is as long as it says
                pass
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} cannot be read as safetensors: {error}; copy the file again") from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self._place:
                raise ConversionError(f"tensor {name} is in both {self._place[name][0]} and {file}")
            if entry["dtype"] not in CODES:
                raise ConversionError(f"{path}: tensor {name} has unknown format {entry['dtype']}")
            self.stored[name] = Spec(tuple(entry["shape"]), CODES[entry["dtype"]])
            self._place[name] = (file, 8 + size + entry["data_offsets"][0])

    def read(self, name: str) -> Tensor:
        """The tensor of that name; its bytes are hashed first when a hash is known."""
        if name not in self.fp8:
            return self.read_stored(name)
        return fp8.dequantize(self.read_stored(name), self.read_stored(self.fp8[name]), self._wide)

    def read_stored(self, name: str) -> Tensor:
        """The same as the file holds it."""
        file, offset = self._place[name]
        tensor = torch.empty(self.stored[name].shape, dtype=self.stored[name].dtype)
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset)
            if stream.readinto(raw_bytes(tensor)) != tensor.nbytes:
                raise ConversionError(f"{self.folder / file} became shorter while it was read; copy the file again")
        expected = self.hashes.get(name)
        if expected is not None and tensor_hash(tensor) != expected:
            raise ConversionError(
                f"{self.folder / file}: tensor {name} is not the one that was exported (SHA-256 "
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
class Shard:
    """What a complete shard holds.

    Attributes:
        sha256: Hash of the file.
        tensors: Name -> hash of the tensor's bytes.
    """

    sha256: str
    tensors: dict[str, str]


def plan_shards(specs: Mapping[str, Spec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File -> names of its tensors. A shard ends before it would hold more than so many bytes of tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def write_shard(path: Path, names: Sequence[str], tensors: Tensors) -> Shard:
    """Write one file and push it to the disk. The same tensors give the same bytes.

    Args:
        path: The file.
        names: Its tensors.
        tensors: Where they come from.
    """
    # Wide formats first: every tensor then starts at a multiple of its element size.
    ordered = sorted(names, key=lambda n: -tensors.specs[n].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in ordered:
        spec = tensors.specs[name]
        end = begin + spec.nbytes
        header[name] = {"dtype": CODE_OF[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole, hashes = hashlib.sha256(), {}
    with path.open("wb") as file:
        begun = len(text).to_bytes(8, "little") + text
        file.write(begun)
        whole.update(begun)
        for name in ordered:
            tensor = tensors.read(name)
            assert Spec.of(tensor) == tensors.specs[name], name
            data = raw_bytes(tensor)
            file.write(data)
            whole.update(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return Shard(whole.hexdigest(), hashes)


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], specs: Mapping[str, Spec]) -> None:
    """Say which tensor is in which shard, where there are several."""
    if len(shards) > 1:
        total = sum(s.nbytes for s in specs.values())
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
