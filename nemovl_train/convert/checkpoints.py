"""Between Hugging Face folders and sealed checkpoints. The only module of `convert` that builds a model or a layout."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.config import DataConfig
from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import parent_of, refuse_adapters
from nemovl_train.checkpoint.lineage import lineage_of
from nemovl_train.checkpoint.sealed import Verified
from nemovl_train.checkpoint.streamed import StoredTensors, save_streamed
from nemovl_train.config.build import build
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import ModelConfig, ParallelConfig, RunConfig
from nemovl_train.convert.carried import FOLDER as CARRIED
from nemovl_train.convert.carried import Carried, carry
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.hf_config import CHAT_TEMPLATE, PREPROCESSOR, TOKENIZER_FILES, read_media_budget
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.hf_layout import RELEASED_MEDIA, MediaBudget
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.mapping import dtype_name, report
from nemovl_train.convert.names import Entry, Precision, kind_of, table
from nemovl_train.convert.stored import from_stored, to_stored
from nemovl_train.exceptions import CheckpointError, ConversionError
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.vlm import ATTRIBUTES, NemotronVL, build_model
from nemovl_train.parallel.layout import Layout

log = logging.getLogger(__name__)

CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself, without its tensors.

    Attributes:
        config: Sizes of the model.
        facts: For the model card.
        tokenizer: Folder of the tokenizer that belongs to the weights.
        export: Further arguments of `export_canonical` (tiling, and what an imported folder had).
    """

    config: ModelConfig
    facts: dict[str, Any]
    tokenizer: Path | None = None
    export: dict[str, Any] = field(default_factory=dict)


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


def describe_checkpoint(folder: Path, *, parent: Path | None = None) -> CheckpointInfo:
    """Sizes, format and origin of a checkpoint: from itself if it was imported, else from its stage's config.

    Args:
        folder: The checkpoint.
        parent: Where the checkpoint is now that its run started from; None looks for it.

    Raises:
        ConversionError: The stage's config is missing.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    home = folder.parent.parent
    if "model" in state:
        return _imported(state, home)
    written = home / "config.yaml"
    if not written.is_file():
        raise ConversionError(
            f"{folder} was moved out of its stage: {written}, which has the model's sizes, is missing"
        )
    run = load_yaml(RunConfig, written)
    facts = {
        "recipe": f"{run.run.name}/{run.run.stage}, {folder.name}",
        # Stage, checkpoints folder and step; the rest of the path says nothing on another machine.
        "parent": "/".join(Path(state.get("parent") or "initial weights").parts[-3:]),
        "data": {name: source.weight for name, source in run.data.sources.items()},
        "trained parts": list(run.trainer.train),
        "seed": run.trainer.seed,
        "checkpoint integrity": sealed.seal_of(folder),
        "lineage": lineage_of(folder),
    }
    if run.data.video_pruning_rate:
        facts["video pruning rate"] = run.data.video_pruning_rate
    if measured := _measured(home, state.get("step")):
        facts["held-out results"] = measured
    export: dict[str, Any] = {"media": _media_budget(run.data)}
    if run.precision.fp8 != "none":
        export["bf16_layers"] = run.precision.bf16_layers
    behind = import_behind(folder, parent=parent)
    imported = None if behind is None else _imported(behind.state, behind.home)
    if imported is not None and imported.config.parts == run.model.parts:
        export |= {k: imported.export[k] for k in ("carried", "constants", "state_dtype") if k in imported.export}
        facts["imported from"] = imported.facts["parent"]
    return CheckpointInfo(
        config=run.model,
        facts=facts,
        tokenizer=Path(run.data.tokenizer) if run.data.tokenizer else None,
        export=export,
    )


def _measured(stage: Path, step: int | None) -> dict[str, Any]:
    """Loss and exact match of every held-out set, where the stage's evaluation is of this step; else empty."""
    path = stage / "evaluation.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not found or found.get("step") != step:
        return {}
    return {
        name: {key: round(scores[key], 4) for key in ("loss", "exact_match") if scores.get(key) is not None}
        for name, scores in found["sources"].items()
    }


@dataclass(frozen=True, kw_only=True)
class Import:
    """An imported checkpoint.

    Attributes:
        state: Contents of its `state.json`.
        home: Folder with its tokenizer and what else came with it.
    """

    state: dict[str, Any]
    home: Path


def import_behind(folder: Path, *, parent: Path | None = None) -> Import | None:
    """The import at the root of a checkpoint's parents, itself included, where it is still on this machine.

    Args:
        folder: A checkpoint.
        parent: Where its own parent is now; None looks for it.
    """
    while True:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if "model" in state:
            return Import(state=state, home=folder.parent.parent)
        if state.get("parent") is None:
            return None
        found = parent or parent_of(folder)
        if found is None:
            log.warning(
                "the parent checkpoint %s is not here: what an imported folder carried is left out", state["parent"]
            )
            return None
        folder, parent = found, None


def _media_budget(data: DataConfig) -> MediaBudget:
    return MediaBudget(
        max_num_tiles=data.max_tiles,
        use_thumbnail=data.use_thumbnail,
        video_fps=data.video_fps,
        video_max_frames=data.max_frames,
        video_pruning_rate=data.video_pruning_rate,
    )


def _imported(state: Mapping[str, Any], home: Path) -> CheckpointInfo:
    problems: list[str] = []
    # A merged checkpoint carries what its base's import had, which described that import.
    then = state.get("carried", state)
    config, imported = (build(ModelConfig, of["model"], problems) for of in (state, then))
    report(list(dict.fromkeys(problems)), f"{home} holds a model of another version")
    export: dict[str, Any] = {}
    if "constants" in state:
        export["constants"] = {
            name: torch.tensor(values, dtype=getattr(torch, dtype)).view(shape)
            for name, (dtype, shape, values) in state["constants"].items()
        }
    if "bf16_layers" in state:
        export["bf16_layers"] = state["bf16_layers"]
    if "state_dtype" in state:
        export["state_dtype"] = getattr(torch, state["state_dtype"])
    media = MediaBudget(**state["media"]) if "media" in state else RELEASED_MEDIA
    export["media"] = media
    if (home / CARRIED).is_dir():
        export["carried"] = Carried(
            folder=home / CARRIED,
            config=imported,
            media=MediaBudget(**then["media"]) if "media" in then else RELEASED_MEDIA,
            dtype=then["dtype"],
        )
    return CheckpointInfo(
        config=config,
        facts={"parent": state["source"], **state.get("facts", {})},
        tokenizer=home / TOKENIZER if (home / TOKENIZER).is_dir() else None,
        export=export,
    )


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
