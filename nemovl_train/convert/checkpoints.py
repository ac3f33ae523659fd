"""Between Hugging Face folders and sealed checkpoints. The only module of `convert` that builds a model or a layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.config import DataConfig
from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import refuse_adapters
from nemovl_train.config.build import build
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import ModelConfig, ParallelConfig, RunConfig
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.hf_config import CHAT_TEMPLATE, PREPROCESSOR, TOKENIZER_FILES, read_media_budget
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.hf_layout import MediaBudget
from nemovl_train.convert.mapping import dtype_name, report
from nemovl_train.convert.names import kind_of
from nemovl_train.exceptions import CheckpointError, ConversionError
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.vlm import NemotronVL, build_model
from nemovl_train.parallel.layout import Layout

CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself, without its tensors.

    Attributes:
        config: Sizes of the model.
        dtype: Format of the parameters.
        facts: For the model card.
        tokenizer: Folder of the tokenizer that belongs to the weights.
        export: Further arguments of `export_canonical` (tiling, and what an imported folder had).
    """

    config: ModelConfig
    dtype: torch.dtype
    facts: dict[str, Any]
    tokenizer: Path | None = None
    export: dict[str, Any] = field(default_factory=dict)


def import_checkpoint(hf_dir: Path, out: Path) -> Path:
    """Import a Hugging Face folder as a checkpoint, its tokenizer beside it. `out` appears when all of it is written.

    Returns:
        The checkpoint's folder; `trainer.init_from` takes it or `out`.

    Raises:
        ConversionError: `out` exists or cannot be written, the disk is full, or the folder cannot be imported.
    """
    refuse_existing(out)
    folder = HFFolder(hf_dir)
    constants = {n: [dtype_name(t.dtype), list(t.shape), t.flatten().tolist()] for n, t in folder.constants().items()}
    origin: dict[str, Any] = {
        "source": hf_dir.resolve().name,
        "state_dtype": dtype_name(folder.state_dtype),
        "constants": constants,
    }
    if (hf_dir / PREPROCESSOR).is_file():
        origin["media"] = asdict(read_media_budget(hf_dir))
    work = out.with_name(f".{out.name}.partial")
    with explain_writes(out.parent):
        try:
            shutil.rmtree(work, ignore_errors=True)  # left by an import that was killed
            work.mkdir(parents=True)
            path = save_as_checkpoint(folder.config, folder.tensors(), work, dtype=folder.dtype, origin=origin)
            copy_tokenizer(hf_dir, work)
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
    source: Path, out: Path, *, tokenizer: Path | None = None, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Export a checkpoint, a stage's newest one, or a run's last stage.

    Args:
        source: Checkpoint, stage or run folder.
        out: Folder to make.
        tokenizer: Folder with tokenizer.json; None takes the one that the checkpoint names.
        dtype: `fp32` or `bf16`; None keeps the checkpoint's.
        overwrite: Replace an earlier export of that name.

    Raises:
        ConversionError: No complete checkpoint, no tokenizer where one is needed, or `out` exists.
    """
    info, tensors = checkpoint_tensors(source)
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
        dtype=None if dtype is None else DTYPES[dtype],
        overwrite=overwrite,
        **info.export,
    )


def save_as_checkpoint(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    out: Path,
    *,
    dtype: torch.dtype,
    origin: Mapping[str, Any],
    may_lack: tuple[str, ...] = (),
    seed: int = 1234,
) -> Path:
    """Write canonical tensors as a sealed checkpoint that `trainer.init_from` takes.

    Args:
        config: Sizes of the model.
        tensors: (canonical name, tensor), every parameter once.
        out: New folder; the checkpoint is `out/checkpoints/step_00000000`.
        dtype: Format of the parameters.
        origin: JSON facts about where the weights came from, `source` among them; kept in the checkpoint's state.
        may_lack: Prefixes of parameters that may have no tensor: they get their initial values (a new projector).
        seed: Seed of those values.

    Raises:
        ConversionError: `out` exists, or the tensors are not those of the model.
    """
    refuse_existing(out)
    with single_process_model(config, dtype, seed=seed) as model:
        load_tensors(model, tensors, may_lack=may_lack)
        state = {"model": asdict(config), "dtype": dtype_name(dtype), **origin}
        root = out / CHECKPOINTS
        root.mkdir(parents=True, exist_ok=True)
        return sealed.save(root, 0, model=model, optimizer=None, state=state, run_id=f"import/{config.name}")


def checkpoint_tensors(path: Path) -> tuple[CheckpointInfo, Iterator[tuple[str, Tensor]]]:
    """Canonical tensors of a checkpoint, whatever layout saved it. It is read when the iterator starts.

    Args:
        path: A checkpoint, a stage folder, or a run folder (its last stage with a checkpoint).

    Raises:
        ConversionError: There is no complete checkpoint, or it holds adapters alone.
    """
    folder = find_checkpoint(path)
    try:
        refuse_adapters(folder)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    info = describe_checkpoint(folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with single_process_model(info.config, info.dtype) as model:
            sealed.load(folder, model=model)
            yield from canonical_state(model).items()

    return info, tensors()


def find_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint under a checkpoint, stage or run folder.

    Raises:
        ConversionError: There is none.
    """
    if (path / "integrity.json").is_file():
        return path
    candidates = [path / CHECKPOINTS, path]
    schedule = path / "schedule.json"
    if schedule.is_file():
        # The last stage that has a checkpoint carries the schedule's result so far.
        names = [stage["name"] for stage in json.loads(schedule.read_text(encoding="utf-8"))["stages"]]
        candidates = [path / name / CHECKPOINTS for name in reversed(names)]
    for root in candidates:
        found = sealed.latest(root)
        if found is not None:
            return found
    raise ConversionError(f"{path}: no complete checkpoint here; name a checkpoint, a stage folder or a run folder")


def describe_checkpoint(folder: Path) -> CheckpointInfo:
    """Sizes, format and origin of a checkpoint: from itself if it was imported, else from its stage's config.

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
        "checkpoint integrity": (folder / "COMPLETE").read_text(encoding="utf-8").strip(),
    }
    return CheckpointInfo(
        config=run.model,
        dtype=DTYPES[run.precision.params],
        facts=facts,
        tokenizer=Path(run.data.tokenizer) if run.data.tokenizer else None,
        export={"media": _media_budget(run.data)},
    )


def _media_budget(data: DataConfig) -> MediaBudget:
    return MediaBudget(
        max_num_tiles=data.max_tiles,
        use_thumbnail=data.use_thumbnail,
        video_fps=data.video_fps,
        video_max_frames=data.max_frames,
    )


def _imported(state: Mapping[str, Any], home: Path) -> CheckpointInfo:
    problems: list[str] = []
    config = build(ModelConfig, state["model"], problems)
    report(problems, f"{home} holds a model of another version")
    export: dict[str, Any] = {}
    if "constants" in state:
        export["constants"] = {
            name: torch.tensor(values, dtype=getattr(torch, dtype)).view(shape)
            for name, (dtype, shape, values) in state["constants"].items()
        }
    if "state_dtype" in state:
        export["state_dtype"] = getattr(torch, state["state_dtype"])
    if "media" in state:
        export["media"] = MediaBudget(**state["media"])
    return CheckpointInfo(
        config=config,
        dtype=getattr(torch, state["dtype"]),
        facts={"parent": state["source"], **state.get("facts", {})},
        tokenizer=home / TOKENIZER if (home / TOKENIZER).is_dir() else None,
        export=export,
    )


@contextmanager
def single_process_model(config: ModelConfig, dtype: torch.dtype, *, seed: int = 1234) -> Iterator[NemotronVL]:
    """The model in one process, weights initialised; its groups live as long as the context."""
    layout = Layout.create(ParallelConfig())
    try:
        yield build_model(config, layout, params_dtype=dtype, parts=config.parts, seed=seed)
    finally:
        layout.destroy()


def canonical_state(model: NemotronVL) -> dict[str, Tensor]:
    """Parameters of a one-process model by canonical name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_tensors(model: NemotronVL, tensors: Iterable[tuple[str, Tensor]], *, may_lack: tuple[str, ...] = ()) -> None:
    """Copy canonical tensors into a one-process model.

    Args:
        model: Receives the values, converted to its formats.
        tensors: (canonical name, tensor).
        may_lack: Prefixes of parameters that keep their initial values when no tensor comes for them.

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
    # str.startswith of an empty tuple is False: then nothing may be lacking.
    report([f"no tensor for {n}" for n in left if not n.startswith(may_lack)], "the model is not filled")
