"""Writes a Hugging Face folder: streamed, sharded, deterministic, resumable, and visible only when complete.

Peak memory is one canonical tensor and its Hugging Face parts, whatever the model's size. Work goes on in a hidden
folder beside the final name. What a killed export of the same weights left there is kept, shard by shard, as far as
its hashes hold.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemovl_train.checkpoint.files import files_below, fsync, sha256, write_whole
from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.card import model_card
from nemovl_train.convert.carried import Carried
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.fp8 import is_scale, linear_weights, quantization_config, quantized
from nemovl_train.convert.hf_config import write_config
from nemovl_train.convert.hf_layout import RELEASED_MEDIA, MediaBudget
from nemovl_train.convert.lazy import Tensors
from nemovl_train.convert.mapping import common_dtype, dtype_name, folder_tensors
from nemovl_train.convert.names import KINDS, constant_names, table
from nemovl_train.convert.tensor_files import CODE_OF, MAX_SHARD_BYTES, Shard, plan_shards, write_index, write_shard
from nemovl_train.exceptions import ConversionError

log = logging.getLogger(__name__)

MANIFEST = "nemovl_export.json"
MANIFEST_FORMAT = 1
PROGRESS = "progress.json"


def export_canonical(
    tensors: Tensors | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    out_dir: Path,
    *,
    kind: str,
    tokenizer: Path | None,
    card: Mapping[str, Any],
    identity: str | None = None,
    found: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    constants: Mapping[str, Tensor] | None = None,
    media: MediaBudget = RELEASED_MEDIA,
    carried: Carried | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    fp8: bool = False,
    bf16_layers: int = 0,
) -> Path:
    """Write canonical tensors as a folder in the released layout.

    The folder appears under its name only when every byte is on the disk. The same tensors give the same bytes.

    Args:
        tensors: Each tensor of the model by canonical name.
        config: Sizes of the model.
        out_dir: Folder to make.
        kind: `vlm`, `language` or `vision`.
        tokenizer: Folder whose tokenizer files (and own chat template) are copied; None for a tower.
        card: Facts for the model card: recipe, parent, data, results.
        identity: Hash of where the values come from. With it an export that was cut off is continued.
        found: JSON facts that reading the tensors updates (the largest of some differences). They are kept beside the
            shards and put back when the export is continued, since tensors of kept shards are not read again.
        dtype: Format of the weights; None keeps that of the tensors.
        state_dtype: Format of A_log and D.
        constants: Tower constants of an imported folder (`mapping.constants_of`); None writes our own.
        media: How images and videos become tiles, for the preprocessor.
        carried: What an imported folder had besides; None writes our own documents alone.
        max_shard_bytes: Largest shard.
        overwrite: Replace `out_dir` if an export made it.
        fp8: Write the language model's linear layers in FP8 (`fp8.py`).
        bf16_layers: With `fp8`, layers at each end of the language model that are not.

    Returns:
        `out_dir`.

    Raises:
        ConversionError: The folder exists or is being written, or a tensor is missing, unknown, wrongly shaped or
            typed, or the disk is full or cannot be written.
    """
    if kind not in KINDS:
        raise ConversionError(f"kind {kind!r}; known are {', '.join(KINDS)}")
    with explain_writes(out_dir.parent):
        canonical = Tensors.of(tensors)
        written = dtype or common_dtype(canonical.specs, table(config, kind))
        theirs = folder_tensors(canonical, config, kind, constants=constants, dtype=dtype, state_dtype=state_dtype)
        quantization = None
        if fp8:
            chosen = set(linear_weights(config, kind, ends=bf16_layers))
            theirs = quantized(theirs, chosen, written)
            quantization = quantization_config(n for n in linear_weights(config, kind) if n not in chosen)
        ends = bf16_layers if fp8 else None
        export = _Export(config=config, kind=kind, dtype=written, tensors=theirs, plain_ends=ends)
        with _WorkFolder(out_dir, identity, export, max_shard_bytes, {} if found is None else found) as work:
            _finish_overwrite(out_dir)
            _refuse_existing(out_dir, overwrite)
            work.write_weights()
            write_config(
                config,
                work.path,
                kind=kind,
                dtype=dtype_name(export.dtype),
                tokenizer=tokenizer,
                media=media,
                carried=carried,
                quantization=quantization,
            )
            _write_card_and_manifest(work, export, card)
            _publish(work.path, out_dir)
    return out_dir


@dataclass(frozen=True, kw_only=True)
class _Export:
    """What is to be written: Hugging Face tensors, read when their turn comes.

    With FP8, so many layers at each end are not in it; else None.
    """

    config: ModelConfig
    kind: str
    dtype: torch.dtype
    tensors: Tensors
    plain_ends: int | None


class _WorkFolder:
    """The hidden folder beside the final name, held by one export at a time.

    Leaving it in good order, or with an error in the weights, removes it. A kill, Ctrl-C and a full disk leave the
    complete shards for the next export with the same identity and plan.
    """

    def __init__(
        self,
        out_dir: Path,
        identity: str | None,
        export: _Export,
        max_shard_bytes: int,
        found: dict[str, Any],
    ) -> None:
        self.out_dir = out_dir
        self.path = out_dir.parent / f".{out_dir.name}.partial"
        self.tensors = export.tensors
        self.plan = plan_shards(export.tensors.specs, max_shard_bytes=max_shard_bytes)
        self.done: dict[str, Shard] = {}
        self._found = found
        self._lock: int | None = None
        layout = {
            file: [[n, CODE_OF[self.tensors.specs[n].dtype], list(self.tensors.specs[n].shape)] for n in names]
            for file, names in self.plan.items()
        }
        self._key = None if identity is None else hashlib.sha256(json.dumps([identity, layout]).encode()).hexdigest()

    def __enter__(self) -> "_WorkFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        self.done = self._complete_shards()
        for path in self.path.iterdir():
            if path.name not in self.done and path.name != PROGRESS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.done:
            log.info("continuing an export that was cut off: %d of %d shards are there", len(self.done), len(self.plan))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if not (self.done and isinstance(error, OSError | KeyboardInterrupt) and self._key is not None):
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _complete_shards(self) -> dict[str, Shard]:
        """Shards of an earlier export of the same bytes whose files still have their hashes."""
        try:
            found = json.loads((self.path / PROGRESS).read_text(encoding="utf-8"))
            shards = {file: Shard(**entry) for file, entry in found["shards"].items()}
            same, known = self._key is not None and found["key"] == self._key, dict(found["found"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        kept = {f: s for f, s in shards.items() if same and f in self.plan and (self.path / f).is_file()}
        if same:
            self._found.update(known)
        return {file: shard for file, shard in kept.items() if sha256(self.path / file) == shard.sha256}

    def write_weights(self) -> None:
        """Write the shards that are missing, and the index."""
        for file, names in self.plan.items():
            if file not in self.done:
                self.done[file] = write_shard(self.path / file, names, self.tensors)
                shards = {f: asdict(s) for f, s in self.done.items()}
                progress = {"key": self._key, "shards": shards, "found": self._found}
                write_whole(self.path / PROGRESS, json.dumps(progress))
        (self.path / PROGRESS).unlink()
        write_index(self.path, self.plan, self.tensors.specs)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file; the shards' were made while they were written."""
        shards = {file: shard.sha256 for file, shard in self.done.items()}
        names = {str(path.relative_to(self.path)): path for path in files_below(self.path)}
        return {name: shards.get(name) or sha256(path) for name, path in names.items()}


def _lock(folder: Path) -> int | None:
    """Descriptor that holds a folder's lock until it is closed or its process dies; None on a disk without locks.

    Raises:
        ConversionError: Another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        name = folder.name.removeprefix(".").removesuffix(".partial")
        raise ConversionError(
            f"another export is writing {folder.parent / name}; wait for it, or choose another --out"
        ) from error
    except OSError:  # the file system has no locks
        os.close(handle)
        return None
    return handle


def _finish_overwrite(out_dir: Path) -> None:
    """Put right what an overwrite left that was killed between its renames."""
    old = _old(out_dir)
    if out_dir.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(out_dir)


def _old(out_dir: Path) -> Path:
    return out_dir.parent / f".{out_dir.name}.old"


def _refuse_existing(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not overwrite:
        raise ConversionError(f"{out_dir} exists; choose another --out, or delete it first")
    if not (out_dir / MANIFEST).is_file():
        raise ConversionError(f"{out_dir} exists and no export made it (it has no {MANIFEST}); choose another --out")


def _write_card_and_manifest(work: _WorkFolder, export: _Export, card: Mapping[str, Any]) -> None:
    constants = set(constant_names(export.kind).values())
    specs = export.tensors.specs
    parameters = sum(s.count for n, s in specs.items() if n not in constants and not is_scale(n))
    files = work.hashes()
    text = model_card(
        export.config,
        export.kind,
        parameters=parameters,
        tensors=len(specs),
        dtype=dtype_name(export.dtype),
        files=files,
        card=card,
        plain_ends=export.plain_ends,
    )
    (work.path / "README.md").write_text(text, encoding="utf-8")
    files["README.md"] = sha256(work.path / "README.md")
    hashes = {name: value for shard in work.done.values() for name, value in shard.tensors.items()}
    manifest = {
        "format": MANIFEST_FORMAT,
        "kind": export.kind,
        "parameters": parameters,
        "files": files,
        "tensors": {
            n: {"dtype": CODE_OF[s.dtype], "shape": list(s.shape), "sha256": hashes[n]} for n, s in specs.items()
        },
    }
    (work.path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _publish(temporary: Path, out_dir: Path) -> None:
    """Rename into place. An older export of that name is moved aside first: the name never holds half of one."""
    for path in temporary.rglob("*"):
        fsync(path)
    fsync(temporary)
    old = _old(out_dir)
    replaces = out_dir.exists()
    if replaces:
        out_dir.rename(old)
    try:
        temporary.rename(out_dir)
    except OSError:
        if replaces:
            old.rename(out_dir)
        raise
    fsync(out_dir.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
