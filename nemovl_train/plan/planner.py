"""A plan of one run: what it trains, whether it fits, how long it takes. Needs a checked config, no GPU and no data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nemovl_train.config.schema import RunConfig
from nemovl_train.config.validate import MOST_BF16_SUMS
from nemovl_train.exceptions import ConfigError
from nemovl_train.plan.hardware import GPU_TYPES, STORAGE_BYTES, Gpu
from nemovl_train.plan.load import Grid, PackLoad, grid_of, heaviest, pack_of
from nemovl_train.plan.memory import Memory, host_bytes, memory, optimizer_bytes
from nemovl_train.plan.policy import LEANER, STATES, Policy, leaner, policy_of
from nemovl_train.plan.timing import StepTime, pack_flops, step_time
from nemovl_train.plan.traffic import Flow, flows
from nemovl_train.plan.trainable import trainable

SAVE_BLOCK_BYTES = 2**26
"""Unit in which a background save takes page-locked memory (`checkpoint/storage.py`, which needs torch)."""
_MOMENT_BYTES = 8
"""Two float32 moments of a trained parameter."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that follows from a config by arithmetic.

    Attributes:
        config: The run.
        gpu: Type of its GPUs.
        grid: How ranks share the work.
        load: An average pack.
        heaviest: A pack of images alone, in a run with images.
        memory: Bytes of one rank with the heaviest pack.
        host_bytes: Of one rank in host memory, with `recompute.*=offload` and `optim.offload`.
        time: Seconds of one step.
        flows: Communication of one step.
    """

    config: RunConfig
    gpu: Gpu
    grid: Grid
    load: PackLoad
    heaviest: PackLoad
    memory: Memory
    host_bytes: float
    time: StepTime
    flows: list[Flow]

    @property
    def packs_per_rank(self) -> int:
        """Micro-batches of a step: packs that one group of TP x CP ranks takes."""
        return math.ceil(self.config.trainer.global_batch / self.grid.dp)

    @property
    def headroom(self) -> float:
        """Bytes of device memory left; negative when the run does not fit."""
        return self.gpu.memory_bytes - self.gpu.outside_pool_bytes - self.memory.total

    @property
    def fits(self) -> bool:
        """Whether every pack fits."""
        return self.headroom >= 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens that the packs of a step can hold."""
        return self.config.trainer.global_batch * self.config.data.seq_length

    @property
    def useful_tokens_per_step(self) -> int:
        """Tokens of samples in a step."""
        return self.config.trainer.global_batch * self.load.useful_tokens

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.config.trainer.steps * self.time.total / 3600

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Useful ones."""
        return self.useful_tokens_per_step / self.time.total / self.grid.gpus

    @property
    def useful_flops_per_step(self) -> float:
        """Model FLOPs of a step, tower included, padding and recomputation left out."""
        return pack_flops(self.config, self.load, useful=True).total * self.config.trainer.global_batch

    @property
    def mfu(self) -> float:
        """Useful model FLOPs over what the GPUs' data sheet allows."""
        return self.useful_flops_per_step / self.time.total / self.grid.gpus / self.gpu.peak_flops

    @property
    def samples_planned(self) -> float:
        """Samples that the run's steps take."""
        return self.config.trainer.steps * self.config.trainer.global_batch * self.load.samples

    @property
    def checkpoint_bytes(self) -> float:
        """Of one checkpoint: state of what trains, and all weights or, with adapters, those that train."""
        width = 4 if self.config.precision.params == "fp32" else 2
        rows = trainable(self.config).values()
        trained = sum(row.trained for row in rows)
        saved = trained if self.config.adapter.rank else sum(row.own for row in rows)
        # A float32 weight is its own master.
        states = STATES[self.config.optim.states].optimizer if width == 2 else _MOMENT_BYTES
        return width * saved + states * trained

    @property
    def save_bytes(self) -> float:
        """Host memory of the rank that holds most of a checkpoint that is saved in the background, in whole blocks.

        Weights are written by the first rank that has them, optimizer state by each rank.
        """
        if not self.config.checkpoint.in_background:
            return 0.0
        width = 4 if self.config.precision.params == "fp32" else 2
        saved = 0.0
        for part, row in trainable(self.config).items():
            count = row.trained if self.config.adapter.rank else row.own
            saved += width * count / (self.grid.tp if part == "language" else 1)
        saved += optimizer_bytes(self.config, self.grid)
        return math.ceil(saved / SAVE_BLOCK_BYTES) * SAVE_BLOCK_BYTES

    @property
    def checkpoint_seconds(self) -> float:
        """Of writing one, at the assumed rate of storage."""
        return self.checkpoint_bytes / STORAGE_BYTES


def make_plan(config: RunConfig, policy: Policy | None = None) -> Plan:
    """Plans a checked config.

    Args:
        config: A validated config.
        policy: What the training program keeps and recomputes; by the config when None.

    Raises:
        ConfigError: The run uses an engine that plans know nothing of.
    """
    if config.engine.name != "megatron":
        raise ConfigError(
            [
                f"engine.name={config.engine.name}: plans count megatron-core's memory and time alone; "
                "docs/deepspeed.md says what ZeRO keeps where, and engine=megatron plans this run without it"
            ]
        )
    policy = policy or policy_of(config)
    gpu, grid, load = GPU_TYPES[config.cluster.gpu], grid_of(config), pack_of(config)
    packs = math.ceil(config.trainer.global_batch / grid.dp)
    return Plan(
        config=config,
        gpu=gpu,
        grid=grid,
        load=load,
        heaviest=heaviest(config, load),
        memory=memory(config, grid, heaviest(config, load), policy),
        host_bytes=host_bytes(config, grid, heaviest(config, load), policy),
        time=step_time(config, grid, load, gpu, packs=packs, policy=policy),
        flows=flows(config, grid, load, policy, gpu, packs=packs),
    )


def packing_saves(plan: Plan) -> dict[str, float] | None:
    """What packing the samples of an unpacked run would save; None when it packs already."""
    if plan.config.data.packing != "none":
        return None
    config = replace(plan.config, data=replace(plan.config.data, packing="bfd"))
    packed = make_plan(config)
    hours = plan.hours * (plan.load.samples / packed.load.samples) * (packed.time.total / plan.time.total)
    return {
        "fill": round(packed.load.fill, 4),
        "samples_per_pack": round(packed.load.samples, 2),
        "hours": round(hours, 2),
        "share_saved": round(1 - hours / plan.hours, 4),
    }


def would_fit(plan: Plan) -> dict[str, dict[str, Any]]:
    """Peak of the pool with leaner options, for a run that does not fit; empty for one that does."""
    if plan.fits:
        return {}
    room = plan.gpu.memory_bytes - plan.gpu.outside_pool_bytes
    rows = {}
    for options in LEANER:
        if options.get("optim.states") == "lean" and plan.packs_per_rank > MOST_BF16_SUMS:
            continue
        total = memory(leaner(plan.config, options), plan.grid, plan.heaviest).total
        name = " ".join(f"{key}={str(value).lower()}" for key, value in options.items())
        rows[name] = {"bytes": round(total), "fits": total <= room}
    return rows


def node_scaling(plan: Plan) -> list[dict[str, float]]:
    """The same layout and batch on fewer and more GPUs: seconds of a step, and the share of adding gradients."""
    rows = []
    dp = 1
    while dp <= plan.config.trainer.global_batch and plan.grid.pack_ranks * dp <= 4 * max(plan.grid.gpus, 8):
        gpus = plan.grid.pack_ranks * dp
        config = replace(plan.config, cluster=replace(plan.config.cluster, gpus=gpus))
        other = make_plan(config)
        rows.append(
            {
                "gpus": gpus,
                "packs_per_rank": other.packs_per_rank,
                "step_seconds": round(other.time.total, 3),
                "reduce_share": round(other.time.reduce / other.time.total, 4),
                "fits": other.fits,
            }
        )
        dp *= 2
    return rows


def warnings(plan: Plan) -> list[str]:
    """What a launch should know, most important first."""
    return list(_warnings(plan))


def _warnings(plan: Plan) -> Iterator[str]:
    grid, load, config = plan.grid, plan.load, plan.config
    if not plan.fits:
        yield from _does_not_fit(plan)
    if config.trainer.global_batch % grid.dp:
        yield (
            f"trainer.global_batch={config.trainer.global_batch} packs on {grid.dp} data parallel ranks: some of them "
            f"idle in the last of {plan.packs_per_rank} rounds"
        )
    if grid.tp > grid.gpus_per_node:
        yield f"parallel.tp={grid.tp} reaches over nodes of {grid.gpus_per_node} GPUs; keep it at most that"
    if plan.time.reduce > 0.1 * plan.time.total:
        share = plan.time.reduce / plan.time.total
        yield (
            f"adding gradients takes {share:.0%} of a step with {plan.packs_per_rank} pack(s) a rank; fewer data "
            "parallel ranks or a larger batch spread it"
        )
    if plan.time.host > 0.1 * plan.time.total:
        yield "the GPUs wait for the host, which starts many small kernels: fewer ranks a pack or longer packs help"
    if load.fill < 0.9 and (saved := packing_saves(plan)):
        yield (
            f"{1 - load.fill:.0%} of every pack is padding; with data.packing=bfd the same samples take "
            f"{saved['hours']:.1f} instead of {plan.hours:.1f} hours"
        )
    yield from _wrong_steps(plan)
    yield from _unmeasured(plan)


def _does_not_fit(plan: Plan) -> Iterator[str]:
    lacks = -plan.headroom / 2**30
    helps = [name for name, row in would_fit(plan).items() if row["fits"]]
    if layout := _fitting_layout(plan):
        advice = f"set {layout}"
    elif helps:
        advice = f"set {helps[0]}"
    else:
        advice = "neither recomputation nor smaller optimizer states make it fit"
    yield f"does not fit: {lacks:.1f} GiB are missing on each {plan.gpu.name}; {advice}"


def _fitting_layout(plan: Plan) -> str | None:
    """Options of the fastest legal layout on the same GPUs that fits; None where none does."""
    from nemovl_train.plan.search import search  # which makes plans

    config = plan.config
    best = search(replace(config, cluster=replace(config.cluster, gpus=plan.grid.gpus)))[0]
    if not best.fits:
        return None
    parallel = best.config.parallel
    sequence_parallel = str(parallel.sequence_parallel).lower()
    return f"parallel.tp={parallel.tp} parallel.cp={parallel.cp} parallel.sequence_parallel={sequence_parallel}"


def _wrong_steps(plan: Plan) -> Iterator[str]:
    wanted = plan.config.workload.samples
    if wanted is None or abs(plan.samples_planned / wanted - 1) <= 0.02:
        return
    steps = math.ceil(wanted / (plan.config.trainer.global_batch * plan.load.samples))
    yield (
        f"trainer.steps={plan.config.trainer.steps} sees {plan.samples_planned:,.0f} samples, workload.samples is "
        f"{wanted:,}: {steps:,} steps would see them once"
    )


def _unmeasured(plan: Plan) -> Iterator[str]:
    unmeasured = []
    if not plan.gpu.measured:
        unmeasured.append(f"the rates of the {plan.gpu.name}")
    if any(flow.link == "network" for flow in plan.flows):
        unmeasured.append("links between nodes")
    if plan.grid.cp > 1:
        unmeasured.append("our exchange over context parallel ranks")
    if "offload" in (plan.config.recompute.language, plan.config.recompute.vision):
        unmeasured.append("copies of layers' inputs to host memory, which count as hidden")
    if plan.time.state_copies:
        unmeasured.append("the link to host memory")
    if unmeasured:
        yield f"times rest on assumptions for {', '.join(unmeasured)}"


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds, no units to parse."""
    config, grid, load = plan.config, plan.grid, plan.load
    rows = trainable(config)
    return {
        "run": f"{config.run.name}/{config.run.stage}",
        "cluster": {"name": config.cluster.name, "gpu": config.cluster.gpu, "gpus": grid.gpus, "nodes": grid.nodes},
        "layout": {
            "tp": grid.tp,
            "cp": grid.cp,
            "dp": grid.dp,
            "sequence_parallel": grid.sequence_parallel,
            "packs_per_rank": plan.packs_per_rank,
        },
        "parameters": {
            "total": sum(row.held for row in rows.values()),
            "trained": sum(row.trained for row in rows.values()),
            "parts": {
                part: {
                    "count": row.own,
                    "trained": row.whole,
                    "adapters": row.adapters,
                    "adapted_layers": row.layers,
                    "peak_rate": config.optim.lr * getattr(config.optim.lr_scale, part) if row.learns else None,
                }
                for part, row in rows.items()
            },
        },
        "data": {
            "steps": config.trainer.steps,
            "tokens_per_step": plan.tokens_per_step,
            "useful_tokens_per_step": plan.useful_tokens_per_step,
            "tokens": plan.tokens_per_step * config.trainer.steps,
            "fill": round(load.fill, 4),
            "samples_per_pack": round(load.samples, 2),
            "samples": round(plan.samples_planned),
            "tiles_per_pack": load.tiles,
            "packing_saves": packing_saves(plan),
        },
        "memory": {
            "tiles": plan.heaviest.tiles,
            "components": {name: round(value) for name, value in plan.memory.components().items()},
            "total": round(plan.memory.total),
            "outside_pool": plan.gpu.outside_pool_bytes,
            "host": round(plan.host_bytes),
            "host_save": round(plan.save_bytes),
            "device": plan.gpu.memory_bytes,
            "headroom": round(plan.headroom),
            "fits": plan.fits,
            "leaner_options": would_fit(plan),
        },
        "time": {
            "components": {name: round(value, 4) for name, value in plan.time.components().items()},
            "step_seconds": round(plan.time.total, 4),
            "tokens_per_second_per_gpu": round(plan.tokens_per_second_per_gpu, 1),
            "useful_flops_per_step": plan.useful_flops_per_step,
            "mfu": round(plan.mfu, 4),
            "hours": round(plan.hours, 2),
            "gpu_hours": round(plan.hours * grid.gpus, 1),
        },
        "traffic": [
            {
                "purpose": f.purpose,
                "link": f.link,
                "bytes_per_step": round(f.bytes_per_step),
                "seconds": round(f.seconds, 4),
            }
            for f in plan.flows
        ],
        "node_scaling_unmeasured": node_scaling(plan),
        "checkpoint": {
            "bytes": round(plan.checkpoint_bytes),
            "seconds_assumed": round(plan.checkpoint_seconds, 1),
            "every_hours": round(config.checkpoint.every_steps * plan.time.total / 3600, 2),
        },
        "warnings": warnings(plan),
    }
