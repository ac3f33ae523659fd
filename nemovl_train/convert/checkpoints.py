"""Between Hugging Face folders and sealed checkpoints. The only module of `convert` that builds a model or a layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import refuse_adapters
from nemovl_train.checkpoint.sealed import Verified
from nemovl_train.checkpoint.streamed import StoredTensors, save_streamed
from nemovl_train.config.schema import ModelConfig, ParallelConfig
from nemovl_train.convert.carried import FOLDER as CARRIED
from nemovl_train.convert.carried import carry
from nemovl_train.convert.described import TOKENIZER, CheckpointInfo, describe_checkpoint
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.hf_config import CHAT_TEMPLATE, PREPROCESSOR, TOKENIZER_FILES, read_media_budget
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.hf_layout import RELEASED_MEDIA
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.mapping import dtype_name, report
from nemovl_train.convert.names import Entry, Precision, kind_of, table
from nemovl_train.convert.stored import from_stored, to_stored
from nemovl_train.exceptions import CheckpointError, ConversionError
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.vlm import ATTRIBUTES, NemotronVL, build_model
from nemovl_train.parallel.layout import Layout

CHECKPOINTS = "checkpoints"


def import_checkpoint(hf_dir: Path, out: Path, *, source: str | None = None) -> Path:
    """Import a Hugging Face folder as a checkpoint, its small files beside it. `out` appears when all of it is written.

    One tensor is in memory at a time. The checkpoint has no layout of its own: any number of ranks loads it.

    Args:
        hf_dir: The folder.
        out: New folder.
        source: What the records say about where it came from; the folder's name when None.

    Returns:
        The checkpoint's folder; `trainer.init_from` takes it or `out`.

    Raises:
        ConversionError: `out` exists or cannot be written, the disk is full, or the folder cannot be imported.
    """
    refuse_existing(out)
    folder = HFFolder(hf_dir)
    constants = {n: [dtype_name(t.dtype), list(t.shape), t.flatten().tolist()] for n, t in folder.constants().items()}
    media = read_media_budget(hf_dir) if (hf_dir / PREPROCESSOR).is_file() else RELEASED_MEDIA
    origin: dict[str, Any] = {
        "source": source or hf_dir.resolve().name,
        "state_dtype": dtype_name(folder.state_dtype),
        "constants": constants,
        "media": asdict(media),
    }
    work = out.with_name(f".{out.name}.partial")
    with explain_writes(out.parent):
        try:
            shutil.rmtree(work, ignore_errors=True)  # left by an import that was killed
            work.mkdir(parents=True)
            path = save_as_checkpoint(folder.config, folder.tensors(), work, dtype=folder.dtype, origin=origin)
            copy_tokenizer(hf_dir, work)
            carry(hf_dir, work / CARRIED)
            work.rename(out)
        except CheckpointError as error:
            raise ConversionError(f"{out} was not written: {error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return out / path.relative_to(work)


def copy_tokenizer(hf_dir: Path, out: Path) -> None:
    """Copy the tokenizer's files and chat template of a folder to `out/tokenizer`."""
    for name in (*TOKENIZER_FILES, CHAT_TEMPLATE.name):
        if (hf_dir / name).is_file():
            (out / TOKENIZER).mkdir(exist_ok=True)
            shutil.copyfile(hf_dir / name, out / TOKENIZER / name)


def refuse_existing(out: Path) -> None:
    """Raise ConversionError where something is already at `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} exists; choose another --out, or delete it first")


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    fp8: bool = False,
) -> Path:
    """Export a checkpoint, a stage's newest one, or a run's last stage. One that was cut off is continued.

    Args:
        source: Checkpoint, stage or run folder.
        out: Folder to make.
        tokenizer: Folder with tokenizer.json; None takes the one that the checkpoint names.
        dtype: `fp32` or `bf16`; None keeps the checkpoint's.
        overwrite: Replace an earlier export of that name.
        fp8: Write the language model's linear layers in FP8; if the run trained in FP8, those that it did in FP8.

    Raises:
        ConversionError: No complete checkpoint, no tokenizer where one is needed, or `out` exists.
    """
    found = _find_whole(source)
    folder, (info, tensors) = found.folder, _open(found)
    kind = kind_of(info.config)
    tokenizer = tokenizer or info.tokenizer
    if kind != "vision" and tokenizer is None:
        raise ConversionError(f"{source} names no tokenizer; give its folder with --tokenizer DIR")
    return export_canonical(
        tensors,
        info.config,
        out,
        kind=kind,
        tokenizer=tokenizer,
        card=info.facts,
        identity=sealed.seal_of(folder),
        dtype=None if dtype is None else DTYPES[dtype],
        overwrite=overwrite,
        fp8=fp8,
        **info.export,
    )


def save_as_checkpoint(
    config: ModelConfig,
    tensors: Tensors,
    out: Path,
    *,
    dtype: torch.dtype,
    origin: Mapping[str, Any],
    may_lack: tuple[str, ...] = (),
    seed: int = 1234,
) -> Path:
    """Write canonical tensors as a sealed checkpoint that `trainer.init_from` takes, one at a time.

    Args:
        config: Sizes of the model.
        tensors: Every parameter by canonical name.
        out: New folder; the checkpoint is `out/checkpoints/step_00000000`.
        dtype: Format of the parameters. A_log and D are stored as float32, and so is a dt_bias that comes as it.
        origin: JSON facts about where the weights came from, `source` among them; kept in the checkpoint's state.
        may_lack: Parts of the model that may have no tensors: they get their initial values (a new projector).
        seed: Seed of those values.

    Raises:
        ConversionError: `out` exists, or the tensors are not those of the model.
    """
    refuse_existing(out)
    entries = {entry.ours: entry for entry in table(config, kind_of(config))}
    new = [p for p in may_lack if not any(name.startswith(f"{ATTRIBUTES[p]}.") for name in tensors.specs)]
    whole = _union(tensors, _initial(config, new, dtype, seed)) if new else tensors
    problems = [f"no tensor for {n}" for n in entries if n not in whole.specs]
    problems += [f"no parameter for {n}" for n in whole.specs if n not in entries]
    problems += [
        f"{n} has shape {list(s.shape)}, expected {list(entries[n].shape)}"
        for n, s in whole.specs.items()
        if n in entries and s.shape != entries[n].shape
    ]
    report(problems, "the tensors are not those of the model")
    stored = to_stored(in_formats(whole, entries, dtype), config.language)
    root = out / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    return save_streamed(
        root,
        0,
        specs={name: spec.meta() for name, spec in stored.specs.items()},
        read=stored.read,
        state={"model": asdict(config), "dtype": dtype_name(dtype), **origin},
        run_id=f"import/{config.name}",
    )


def _initial(config: ModelConfig, parts: Sequence[str], dtype: torch.dtype, seed: int) -> Tensors:
    """Initial values of some parts, which depend on the seed and their names alone."""
    with single_process() as layout:
        model = build_model(config, layout, params_dtype=dtype, parts=parts, seed=seed)
        return Tensors.of(canonical_state(model))


def _union(first: Tensors, second: Tensors) -> Tensors:
    def read(name: str) -> Tensor:
        return (first if name in first.specs else second).read(name)

    return Tensors({**first.specs, **second.specs}, read)


def in_formats(tensors: Tensors, entries: Mapping[str, Entry], dtype: torch.dtype) -> Tensors:
    """Converted to the formats that a checkpoint holds, in the order of the table.

    Args:
        tensors: Canonical tensors.
        entries: The table by canonical name.
        dtype: Format of the parameters; A_log and D are float32, and so is a dt_bias that comes as it.
    """

    def chosen(name: str) -> torch.dtype:
        precision = entries[name].precision
        wide = precision is Precision.LOOSE and tensors.specs[name].dtype == torch.float32
        return torch.float32 if wide or precision is Precision.STATE else dtype

    specs = {name: Spec(tensors.specs[name].shape, chosen(name)) for name in entries}
    return Tensors(specs, lambda name: tensors.read(name).to(specs[name].dtype))


def checkpoint_tensors(path: Path) -> tuple[CheckpointInfo, Tensors]:
    """Canonical tensors of a checkpoint, whatever layout saved it, read when asked for. Its seal is verified.

    Args:
        path: A checkpoint, a stage folder, or a run folder (its last stage with a checkpoint).

    Raises:
        ConversionError: There is no complete checkpoint, or it holds adapters alone.
    """
    return _open(_find_whole(path))


def _find_whole(path: Path) -> Verified:
    found = _find(path)
    try:
        refuse_adapters(found.folder)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    return found


def _open(found: Verified) -> tuple[CheckpointInfo, Tensors]:
    info = describe_checkpoint(found.folder)
    return info, from_stored(StoredTensors(found), info.config)


def find_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint under a checkpoint, stage or run folder.

    Raises:
        ConversionError: There is none.
    """
    return _find(path).folder


def _find(path: Path) -> Verified:
    if (path / "integrity.json").is_file():
        return sealed.verify(path)
    candidates = [path / CHECKPOINTS, path]
    schedule = path / "schedule.json"
    if schedule.is_file():
        # The last stage that has a checkpoint carries the schedule's result so far.
        names = [stage["name"] for stage in json.loads(schedule.read_text(encoding="utf-8"))["stages"]]
        candidates = [path / name / CHECKPOINTS for name in reversed(names)]
    for root in candidates:
        found = sealed.latest(root)
        if found is not None:
            return Verified(found, sealed.read_seal(found))
    raise ConversionError(f"{path}: no complete checkpoint here; name a checkpoint, a stage folder or a run folder")


@contextmanager
def single_process() -> Iterator[Layout]:
    """A layout of one process; its groups live as long as the context."""
    layout = Layout.create(ParallelConfig())
    try:
        yield layout
    finally:
        layout.destroy()


@contextmanager
def single_process_model(config: ModelConfig, dtype: torch.dtype, *, seed: int = 1234) -> Iterator[NemotronVL]:
    """The model in one process, weights initialised; its groups live as long as the context."""
    with single_process() as layout:
        yield build_model(config, layout, params_dtype=dtype, parts=config.parts, seed=seed)


def canonical_state(model: NemotronVL) -> dict[str, Tensor]:
    """Parameters of a one-process model by canonical name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_tensors(model: NemotronVL, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy canonical tensors into a one-process model.

    Args:
        model: Receives the values, converted to its formats.
        tensors: (canonical name, tensor).

    Raises:
        ConversionError: A tensor has no parameter of its name and shape, or a parameter gets none.
    """
    left = canonical_state(model)
    for name, tensor in tensors:
        target = left.pop(name, None)
        if target is None or target.shape != tensor.shape:
            found = "no such parameter" if target is None else f"shape {list(target.shape)}"
            raise ConversionError(f"{name} {list(tensor.shape)}: the model has {found}")
        target.copy_(tensor)
    report([f"no tensor for {n}" for n in left], "the model is not filled")
