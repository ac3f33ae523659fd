"""What the record of a checkpoint says about it: sizes, facts for a card, and what an export takes besides weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipelines.config import DataConfig
from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import parent_of
from nemovl_train.checkpoint.lineage import lineage_of
from nemovl_train.config.build import build
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import ModelConfig, RunConfig
from nemovl_train.convert.carried import FOLDER as CARRIED
from nemovl_train.convert.carried import Carried
from nemovl_train.convert.hf_layout import RELEASED_MEDIA, MediaBudget
from nemovl_train.convert.mapping import report
from nemovl_train.exceptions import ConversionError

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Folder beside an imported checkpoint with the tokenizer's files."""


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


@dataclass(frozen=True, kw_only=True)
class Import:
    """An imported checkpoint.

    Attributes:
        state: Contents of its `state.json`.
        home: Folder with its tokenizer and what else came with it.
    """

    state: dict[str, Any]
    home: Path


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
