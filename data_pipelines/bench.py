"""How fast packs are made on this machine, and what takes the time."""

import math
import time
from itertools import islice
from typing import Any

import torch

from data_pipelines.config import DataConfig
from data_pipelines.loader import PackStream, open_sources, plan_of
from data_pipelines.pack import PackBuilder
from data_pipelines.schema import Pack

PLAN = "plan"
ADVICE = {
    PLAN: "planning on lengths alone is the slowest: lower data.window_samples",
    "read": "reading is the slowest: move the shards nearer, or give it more workers",
    "text": "tokenising is the slowest: give it more workers",
    "media": "decoding and tiling are the slowest: give it more workers, or store frames instead of videos",
    "join": "joining samples into packs is the slowest: give it more workers",
}


def bench(
    config: DataConfig,
    *,
    tokens_per_tile: int,
    seed: int,
    global_batch: int,
    packs: int,
    tokens_per_second: float,
    ranks_per_pack: int,
    ranks_per_node: int,
) -> dict[str, Any]:
    """Build packs in this process, then, where the config has workers, through them.

    Args:
        config: As for training.
        tokens_per_tile: What the model makes of a tile.
        seed: Seed of the order.
        global_batch: Packs of a step.
        packs: Packs to build; one more warms up.
        tokens_per_second: What one GPU consumes.
        ranks_per_pack: Ranks that share a pack (tensor times context parallel); each of them builds it whole.
        ranks_per_node: GPUs of a node.

    Returns:
        `worker`: rates of one process and its seconds by step; `loader`: rates with all workers, or None; `slowest`,
        `advice`; `workers_per_rank`: processes that keep up with one rank's packs, rounded up; `workers_per_node`.
    """
    torch.set_num_threads(1)
    alone = _alone(config, tokens_per_tile, seed, global_batch, packs)
    loader = _with_workers(config, tokens_per_tile, seed, packs) if config.num_workers else None
    workers = math.ceil(tokens_per_second * ranks_per_pack / alone["tokens_per_second"])
    slowest = max(alone["seconds"], key=alone["seconds"].get)
    return {
        "packs": packs,
        "worker": alone,
        "loader": loader,
        "num_workers": config.num_workers,
        "slowest": slowest,
        "advice": ADVICE[slowest],
        "gpu_tokens_per_second": tokens_per_second,
        "ranks_per_pack": ranks_per_pack,
        "workers_per_rank": workers,
        "workers_per_node": workers * ranks_per_node,
    }


def _alone(config: DataConfig, tokens_per_tile: int, seed: int, global_batch: int, packs: int) -> dict[str, Any]:
    opened = open_sources(config, tokens_per_tile)
    plan = plan_of(config, opened, seed=seed, global_batch=global_batch)
    builder = PackBuilder(config, opened.datasets, opened.rules, opened.tokenizer)
    began = time.perf_counter()
    plan.window(0)
    # A window is planned once for all its packs, however many of them are built here.
    planning = (time.perf_counter() - began) / plan.window_packs * packs
    planned = [plan.pack(i) for i in range(1 + packs)]
    builder.build(planned[0])
    builder.seconds = dict.fromkeys(builder.seconds, 0.0)
    began = time.perf_counter()
    built = [_counts(builder.build(pack).pack) for pack in planned[1:]]
    seconds = planning + time.perf_counter() - began
    for dataset in opened.datasets.values():
        dataset.close()
    return {**_rates(built, seconds), "seconds": {PLAN: round(planning, 4), **_rounded(builder.seconds)}}


def _with_workers(config: DataConfig, tokens_per_tile: int, seed: int, packs: int) -> dict[str, Any]:
    """The first packs pay for the workers' start, and what is built ahead by then comes free: neither is counted."""
    stream = PackStream(config, tokens_per_tile=tokens_per_tile, seed=seed, global_batch=1)
    ahead = config.num_workers * config.read.prefetch
    for _ in islice(stream, ahead + 1):
        pass
    began = time.perf_counter()
    built = [_counts(pack) for step in islice(stream, packs) for pack in step]
    seconds = time.perf_counter() - began
    stream.close()
    return _rates(built, seconds)


def _counts(pack: Pack) -> dict[str, float]:
    return {**pack.stats, "tiles": len(pack.tiles)}


def _rates(built: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    names = {"samples": "num_samples", "tokens": "tokens", "tiles": "tiles"}
    rates = {f"{name}_per_second": sum(counts[key] for counts in built) / seconds for name, key in names.items()}
    return {"packs_per_second": round(len(built) / seconds, 2), **_rounded(rates)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def as_text(found: dict[str, Any]) -> str:
    """The measurement for a terminal."""
    head = f"{'':<22}{'packs/s':>10}{'samples/s':>12}{'tokens/s':>12}{'tiles/s':>10}"
    lines = [head, _row("one process", found["worker"])]
    if found["loader"]:
        lines.append(_row(f"loader, {found['num_workers']} workers", found["loader"]))
    seconds = found["worker"]["seconds"]
    total = sum(seconds.values())
    lines += ["", "share of one process: " + ", ".join(f"{step} {part / total:.0%}" for step, part in seconds.items())]
    lines.append(
        f"a rank that takes {found['gpu_tokens_per_second']:,g} tokens/s, in packs that {found['ranks_per_pack']} "
        f"rank(s) share, needs {found['workers_per_rank']} worker(s), a node {found['workers_per_node']}; "
        f"{found['advice']}"
    )
    return "\n".join(lines)


def _row(name: str, rates: dict[str, Any]) -> str:
    return (
        f"{name:<22}{rates['packs_per_second']:>10,.1f}{rates['samples_per_second']:>12,.0f}"
        f"{rates['tokens_per_second']:>12,.0f}{rates['tiles_per_second']:>10,.0f}"
    )
