"""What a run's worst moment takes, measured before it starts: packs at full length with the optimizer's state there."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from data_pipelines.media.rules import frame_tokens, tokens_kept
from data_pipelines.schema import Pack
from nemovl_train.checkpoint.files import replace_text
from nemovl_train.config.schema import ModelConfig, RunConfig
from nemovl_train.exceptions import RunFailedError
from nemovl_train.parallel.agree import from_every_rank, on_first_rank
from nemovl_train.parallel.layout import Layout
from nemovl_train.plan.load import heaviest, pack_of
from nemovl_train.plan.planner import make_plan
from nemovl_train.training.engine import Engine

log = logging.getLogger(__name__)

FILE = "dry_run.json"


def dry_run(engine: Engine, pack: Pack, config: RunConfig, layout: Layout, folder: Path) -> dict[str, Any]:
    """Run packs, take an update that moves nothing, run them again, and write `dry_run.json`. Collective.

    The engine is of no use afterwards: its moments have seen a step.

    Args:
        engine: The model with its optimizer.
        pack: A pack of this run's data.
        config: The run.
        layout: Owner of the device and of the groups.
        folder: The stage's folder.

    Returns:
        What is written: bytes of the fullest rank (`peak_bytes`, and `reserved_bytes` with what PyTorch holds ready),
        `device_bytes`, `planned_bytes`, tiles of the heaviest pack and its seconds.
    """
    packs = [pack]
    if heaviest(config, pack_of(config)).tiles:
        packs.append(images_alone(pack, config.model, config.data.video_pruning_rate))
    _run(engine, packs)
    # Optimizers make their state at the first update, unless a gradient is not finite.
    if (norm := engine.step(0.0)) is None or not math.isfinite(norm):
        raise RunFailedError(f"{folder}: a gradient of the dry run is not finite ({norm}); its memory says nothing")
    began = time.perf_counter()
    _run(engine, packs)
    seconds = time.perf_counter() - began
    rows = from_every_rank(_memory(layout))
    fullest = max(rows, key=lambda row: row["reserved_bytes"])
    found: dict[str, Any] = {
        **fullest,
        "rank": rows.index(fullest),
        "ranks": layout.world_size,
        "planned_bytes": _planned(config, layout),
        "tiles": max(one.tiles.shape[0] for one in packs),
        "seconds": seconds,
    }
    on_first_rank(lambda: replace_text(folder / FILE, json.dumps(found, indent=1)))
    on_first_rank(lambda: log.info("%s", text(found)))
    return found


def text(found: dict[str, Any]) -> str:
    """What was found, in a sentence."""
    gib = 2**30
    said = f"dry run: {found['peak_bytes'] / gib:.2f} GiB at the peak of rank {found['rank']} of {found['ranks']}"
    said += f" ({found['reserved_bytes'] / gib:.2f} with PyTorch's reserve, {found['device_bytes'] / gib:.1f} there)"
    if found["planned_bytes"] is not None:
        said += f", planned {found['planned_bytes'] / gib:.2f}"
    return f"{said}; heaviest pack: {found['tiles']} tiles; nothing was trained"


def images_alone(pack: Pack, model: ModelConfig, pruning_rate: float = 0.0) -> Pack:
    """A pack of the same length that is one sample of as many tiles as fit, and one token to predict.

    Where videos are pruned it is one video, since more of its tiles fit than of images.
    """
    length, per_tile, side = len(pack.input_ids), model.tokens_per_tile, model.vision.tile_size
    tiles = (length - 1) // per_tile
    counts = torch.full((tiles,), per_tile)
    if pruning_rate:
        while tokens_kept(tiles + 1, per_tile, pruning_rate) < length:
            tiles += 1
        counts = torch.tensor(frame_tokens(tiles, per_tile, pruning_rate))
    visual = int(counts.sum())
    ids = torch.full((length,), model.tokens.eos)
    ids[:visual] = model.tokens.image
    labels = torch.full((length,), -100)
    labels[visual - 1] = model.tokens.eos
    supervised = labels >= 0
    return replace(
        pack,
        index=-1,
        input_ids=ids,
        labels=labels,
        loss_weight=supervised.float(),
        position_ids=torch.arange(length),
        seq_idx=torch.zeros(length, dtype=torch.int32),
        cu_seqlens=torch.full_like(pack.cu_seqlens, length).index_fill_(0, torch.tensor(0), 0),
        max_seqlen=length,
        tiles=torch.zeros(tiles, 3, side, side, dtype=torch.uint8),
        tile_token_start=counts.cumsum(0) - counts,
        tile_tokens=counts if pruning_rate else None,
        media_of_tile=torch.zeros(tiles, dtype=torch.int32) if pruning_rate else torch.arange(tiles, dtype=torch.int32),
        is_thumbnail=torch.zeros(tiles, dtype=torch.bool),
        frame_time=torch.arange(tiles) / 2 if pruning_rate else torch.full((tiles,), float("nan")),
        sample_keys=("images alone",),
        dataset_ids=(pack.dataset_ids[0] if pack.dataset_ids else "",),
        stats={**pack.stats, "tokens": length, "supervised_tokens": 1, "visual_tokens": visual, "padding": 0},
    )


def _run(engine: Engine, packs: Sequence[Pack]) -> None:
    for pack in packs:
        engine.zero_grad()
        engine.forward_backward([pack], [1.0])


def _memory(layout: Layout) -> dict[str, float]:
    if layout.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(layout.device)
        reserved = torch.cuda.max_memory_reserved(layout.device)
        return {"peak_bytes": peak, "reserved_bytes": reserved, "device_bytes": torch.cuda.mem_get_info()[1]}
    resident = psutil.Process().memory_info().rss
    there = psutil.virtual_memory().total
    return {"peak_bytes": resident, "reserved_bytes": resident, "device_bytes": there}


def _planned(config: RunConfig, layout: Layout) -> float | None:
    """What plans say of PyTorch's pool on this many ranks; they know one engine."""
    if config.engine.name != "megatron":
        return None
    return make_plan(replace(config, cluster=replace(config.cluster, gpus=layout.world_size))).memory.total
