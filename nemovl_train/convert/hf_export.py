"""Writes a Hugging Face folder: streamed, sharded, deterministic, and visible only when complete.

Peak memory is one canonical tensor and its Hugging Face parts, whatever the model's size.
"""

import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemovl_train.checkpoint.files import files_below, fsync, sha256
from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.card import model_card
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.hf_config import write_config
from nemovl_train.convert.hf_layout import RELEASED_MEDIA, MediaBudget
from nemovl_train.convert.mapping import Spec, default_constants, dtype_name, stream_to_hf
from nemovl_train.convert.names import KINDS, Entry, Precision, constant_names, table
from nemovl_train.convert.tensor_files import CODE_OF, MAX_SHARD_BYTES, ShardWriter
from nemovl_train.exceptions import ConversionError

MANIFEST = "nemovl_export.json"
MANIFEST_FORMAT = 1


def export_canonical(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    out_dir: Path,
    *,
    kind: str,
    tokenizer: Path | None,
    card: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    constants: Mapping[str, Tensor] | None = None,
    media: MediaBudget = RELEASED_MEDIA,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write canonical tensors as a folder in the released layout.

    The folder appears under its name only when every byte is on the disk. The same tensors give the same bytes, in
    whatever order they come.

    Args:
        tensors: (canonical name, tensor), each of the model exactly once, in any order.
        config: Sizes of the model.
        out_dir: Folder to make.
        kind: `vlm`, `language` or `vision`.
        tokenizer: Folder whose tokenizer files (and own chat template) are copied; None for a tower.
        card: Facts for the model card: recipe, parent, data, results.
        dtype: Format of the weights; None keeps that of the tensors.
        state_dtype: Format of A_log and D.
        constants: Tower constants of an imported folder (`mapping.constants_of`); None writes our own.
        media: How images and videos become tiles, for the preprocessor.
        max_shard_bytes: Largest shard.
        overwrite: Replace `out_dir` if an export made it.

    Returns:
        `out_dir`.

    Raises:
        ConversionError: The folder exists, or a tensor is missing, unknown, repeated, wrongly shaped or typed,
            or the disk is full or cannot be written.
    """
    if kind not in KINDS:
        raise ConversionError(f"kind {kind!r}; known are {', '.join(KINDS)}")
    with explain_writes(out_dir.parent):
        _remove_leftovers(out_dir)
        _refuse_existing(out_dir, overwrite)
        export = _prepare(tensors, config, kind, dtype=dtype, state_dtype=state_dtype, constants=constants)
        _write(export, out_dir, tokenizer=tokenizer, card=card, media=media, max_shard_bytes=max_shard_bytes)
    return out_dir


@dataclass(frozen=True, kw_only=True)
class _Export:
    """What is to be written: a stream of Hugging Face tensors, and the shape and format of each beforehand."""

    config: ModelConfig
    kind: str
    dtype: torch.dtype
    stream: Iterable[tuple[str, Tensor]]
    plan: Mapping[str, Spec]


def _prepare(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    kind: str,
    *,
    dtype: torch.dtype | None,
    state_dtype: torch.dtype,
    constants: Mapping[str, Tensor] | None,
) -> _Export:
    entries = table(config, kind)
    found, tensors = _format_of(tensors, entries)
    names = constant_names(kind)
    chosen = default_constants(config, kind) if constants is None else constants
    extra = {names[short]: t for short, t in chosen.items()}
    plan = _plan(entries, dtype or found, state_dtype) | {n: Spec(tuple(t.shape), t.dtype) for n, t in extra.items()}
    stream = chain(stream_to_hf(tensors, entries, dtype=dtype, state_dtype=state_dtype), extra.items())
    return _Export(config=config, kind=kind, dtype=dtype or found, stream=stream, plan=plan)


def _write(
    export: _Export,
    out_dir: Path,
    *,
    tokenizer: Path | None,
    card: Mapping[str, Any],
    media: MediaBudget,
    max_shard_bytes: int,
) -> None:
    """Write everything beside the final name, then publish it; whatever fails leaves nothing."""
    temporary = out_dir.parent / f".{out_dir.name}.{uuid.uuid4().hex[:8]}.partial"
    temporary.mkdir(parents=True)
    lock = _lock(temporary)
    try:
        writer = ShardWriter(temporary, export.plan, max_shard_bytes=max_shard_bytes)
        _write_weights(writer, export.stream)
        write_config(
            export.config,
            temporary,
            kind=export.kind,
            dtype=dtype_name(export.dtype),
            tokenizer=tokenizer,
            media=media,
        )
        _write_card_and_manifest(temporary, export, card, writer)
        _publish(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_leftovers(out_dir: Path) -> None:
    """Remove what killed exports of this name left beside it. An export that still runs holds its folder's lock."""
    work = f".{glob.escape(out_dir.name)}.????????"
    for partial in out_dir.parent.glob(f"{work}.partial"):
        lock = _lock(partial)
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
    for old in out_dir.parent.glob(f"{work}.old"):
        if old.with_suffix(".partial").exists():
            continue  # its export is about to publish
        if out_dir.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out_dir)


def _lock(folder: Path) -> int | None:
    """Descriptor that holds a folder's lock until it is closed or its process dies; None when it cannot be had."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another export, or the file system has no locks
        os.close(handle)
        return None
    return handle


def _refuse_existing(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not overwrite:
        raise ConversionError(f"{out_dir} exists; choose another --out, or delete it first")
    if not (out_dir / MANIFEST).is_file():
        raise ConversionError(f"{out_dir} exists and no export made it (it has no {MANIFEST}); choose another --out")


def _format_of(
    tensors: Iterable[tuple[str, Tensor]], entries: list[Entry]
) -> tuple[torch.dtype, Iterable[tuple[str, Tensor]]]:
    """Format of the first parameter of the stream, and the stream with nothing taken out of it."""
    plain = {e.ours for e in entries if e.precision is Precision.PARAMS}
    iterator = iter(tensors)
    seen: list[tuple[str, Tensor]] = []
    for item in iterator:
        seen.append(item)
        if item[0] in plain:
            return item[1].dtype, chain(seen, iterator)
    return torch.float32, seen


def _plan(entries: list[Entry], dtype: torch.dtype, state_dtype: torch.dtype) -> dict[str, Spec]:
    plan = {}
    for entry in entries:
        wanted = state_dtype if entry.precision is Precision.STATE else dtype
        plan.update({n: Spec(s, wanted) for n, s in zip(entry.hf, entry.hf_shapes, strict=True)})
    return plan


def _write_weights(writer: ShardWriter, tensors: Iterable[tuple[str, Tensor]]) -> None:
    try:
        for name, tensor in tensors:
            writer.put(name, _as_planned(name, tensor, writer.plan))
        writer.close()
    finally:
        writer.abandon()


def _as_planned(name: str, tensor: Tensor, plan: Mapping[str, Spec]) -> Tensor:
    """A tensor of `Precision.LOOSE` may be wider than the folder; it is narrowed only where that loses nothing."""
    wanted = plan[name].dtype
    if tensor.dtype == wanted:
        return tensor
    narrow = tensor.to(wanted)
    if not torch.equal(narrow.to(tensor.dtype), tensor):
        raise ConversionError(
            f"{name} is {dtype_name(tensor.dtype)} and does not fit {dtype_name(wanted)} without loss; "
            f"export in {dtype_name(tensor.dtype)}, or cast it first"
        )
    return narrow


def _write_card_and_manifest(folder: Path, export: _Export, card: Mapping[str, Any], writer: ShardWriter) -> None:
    kind, constants = export.kind, set(constant_names(export.kind).values())
    parameters = sum(_count(s) for n, s in writer.plan.items() if n not in constants)
    files = {str(p.relative_to(folder)): sha256(p) for p in files_below(folder)}
    text = model_card(
        export.config,
        kind,
        parameters=parameters,
        tensors=len(writer.plan),
        dtype=dtype_name(export.dtype),
        files=files,
        card=card,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    files["README.md"] = sha256(folder / "README.md")
    manifest = {
        "format": MANIFEST_FORMAT,
        "kind": kind,
        "parameters": parameters,
        "files": files,
        "tensors": {
            n: {"dtype": CODE_OF[s.dtype], "shape": list(s.shape), "sha256": writer.hashes[n]}
            for n, s in writer.plan.items()
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _count(spec: Spec) -> int:
    return int(torch.Size(spec.shape).numel())


def _publish(temporary: Path, out_dir: Path) -> None:
    """Rename into place. An older export of that name is moved aside first: the name never holds half of one."""
    for path in temporary.rglob("*"):
        fsync(path)
    fsync(temporary)
    old = None
    if out_dir.exists():
        old = temporary.with_suffix(".old")
        out_dir.rename(old)
    try:
        temporary.rename(out_dir)
    except OSError:
        if old is not None:
            old.rename(out_dir)
        raise
    fsync(out_dir.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
