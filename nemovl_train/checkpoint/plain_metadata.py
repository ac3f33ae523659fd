"""Looks through a checkpoint's pickles before PyTorch opens them, so that loading one never runs code it carries.

`torch.distributed.checkpoint` reads `.metadata` with `pickle.load` (filesystem.py, `FileSystemReader.read_metadata`)
and byte objects with `torch.load(weights_only=False)` (default_planner.py, `DefaultLoadPlanner.load_bytes`). A seal
does not help against a stranger's checkpoint: its author sealed it. Here the first is read by an unpickler that knows
only the classes such a file needs, the second with `weights_only=True`. What passes can be opened by PyTorch as it
stands: a pickle runs nothing but the globals that it names, and all of them were looked at.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from nemovl_train.exceptions import CheckpointError

METADATA = ".metadata"
_COMMON = "common.pt"
# Data classes and one enum; none of them opens, imports or calls anything when it is made or filled.
_CLASSES = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
)


def _allowed() -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {(c.__module__, c.__qualname__): c for c in _CLASSES}
    found["torch", "Size"] = torch.Size
    found |= {("torch", n): v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
    # How PyTorch pickles a layout (torch.strided): a look-up by name in a table of its own.
    found["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    return found


_ALLOWED = _allowed()


class _PlainUnpickler(pickle.Unpickler):
    """Knows the globals of `.metadata`, by exact name: no dotted path leads from one of them to something else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]


def refuse_code(folder: Path) -> None:
    """Refuse a checkpoint whose pickles name anything but plain data. Nothing they carry is run.

    Args:
        folder: A published checkpoint, or its `sharded` folder.

    Raises:
        CheckpointError: Names the file and the global, or the file that cannot be read.
    """
    sharded = folder / "sharded" if (folder / "sharded").is_dir() else folder
    _check_objects(sharded, _read_metadata(sharded / METADATA))
    # Written by older versions of megatron-core, which reads it with torch.load.
    if (sharded / _COMMON).is_file():
        _check_object(sharded / _COMMON, (sharded / _COMMON).read_bytes())


def _read_metadata(path: Path) -> metadata.Metadata:
    try:
        with path.open("rb") as file:
            found = _PlainUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy the checkpoint again") from error
    except Exception as error:  # a pickle can be broken in any way
        raise _refusal(path, error) from error
    if not isinstance(found, metadata.Metadata):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a checkpoint's table of contents")
    return found


def _check_objects(sharded: Path, contents: metadata.Metadata) -> None:
    """Read every byte object as PyTorch will, but as plain data. Tensors it reads with weights_only=True itself."""
    path = sharded / METADATA
    try:
        places = [(i.fqn, s.relative_path, s.offset, s.length) for i, s in contents.storage_data.items()]
        kinds = {name: type(entry) for name, entry in contents.state_dict_metadata.items()}
        transformed = any(getattr(s, "transform_descriptors", None) for s in contents.storage_data.values())
    except AttributeError as error:
        raise CheckpointError(f"{path} is not a checkpoint's table of contents: {error}") from error
    if transformed:
        raise CheckpointError(f"{path} names stream transforms, which nemovl does not write: not loaded")
    for name, file, offset, length in places:
        # A name with a path in it could point anywhere on the reader's disk.
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise CheckpointError(f"{path} names the file {file!r}; expected a plain name in the same folder")
        if kinds.get(name) is metadata.TensorStorageMetadata:
            continue
        try:
            with (sharded / file).open("rb") as stream:
                stream.seek(offset)
                data = stream.read(length)
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{sharded / file}: {name} cannot be read ({error})") from error
        _check_object(sharded / file, data)


def _check_object(path: Path, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can be broken in any way
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not plain data: {_reason(error)}. Loading it could run code, so it was not opened; use a "
        "checkpoint that nemovl wrote, or ask its author for a Hugging Face folder (`nemovl convert export`)"
    )


def _reason(error: Exception) -> str:
    """The line that names the global: torch.load wraps it in advice on how to run the code after all."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0].rstrip(".")
