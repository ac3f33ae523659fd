"""Plans as text for a terminal: tables, and bars of memory and time."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from nemovl_train.plan.calibration import compare
from nemovl_train.plan.hardware import GIB
from nemovl_train.plan.planner import Plan, node_scaling, packing_saves, warnings, would_fit
from nemovl_train.plan.projection import MEASURED, MODELLED, projection
from nemovl_train.plan.trainable import trainable, trainable_text

_BAR = 40
_WIDTH = 118
_RATE = "tokens_per_second_per_gpu"


def plan_text(plan: Plan) -> str:
    """One run, in full."""
    return "\n".join(
        [*_head(plan), "", *_memory(plan), "", *_time(plan), "", *_traffic(plan), "", *_scaling(plan), *_warnings(plan)]
    )


def schedule_text(plans: Sequence[Plan]) -> str:
    """The stages of a chain, a row each, and their sum."""
    rows = [["stage", "layout", "steps", "tokens/step", "GiB", "fits", "s/step", "tok/s/GPU", "hours", "GPU-hours"]]
    for plan in plans:
        rows.append(
            [
                plan.config.run.stage,
                _layout(plan),
                f"{plan.config.trainer.steps:,}",
                _count(plan.tokens_per_step),
                f"{plan.memory.total / GIB:.1f}",
                _yes(plan.fits),
                f"{plan.time.total:.2f}",
                f"{plan.tokens_per_second_per_gpu:,.0f}",
                f"{plan.hours:.1f}",
                f"{plan.hours * plan.grid.gpus:,.0f}",
            ]
        )
    hours, gpu_hours = sum(p.hours for p in plans), sum(p.hours * p.grid.gpus for p in plans)
    rows.append(["all", "", "", "", "", "", "", "", f"{hours:.1f}", f"{gpu_hours:,.0f}"])
    said = [f"{plan.config.run.stage}: {text}" for plan in plans for text in warnings(plan)]
    return "\n".join([*_table(rows), "", *_projection(plans), *_list("warnings", said), _calibrated()])


def _projection(plans: Sequence[Plan]) -> list[str]:
    """Beside the paper's GPU-hours, for the schedule that it is about."""
    found = projection(plans)
    if not found:
        return []
    rows = [["stage", "GPU-hours", "paper's", "ratio", "tok/s/GPU", "paper's", "on measured rates"]]
    for row in found:
        rates = [f"{row[key]:,.0f}" if key in row else "" for key in (_RATE, f"paper_{_RATE}")]
        planned, paper = row["gpu_hours"], row["paper_gpu_hours"]
        times = f"{paper / planned:.2f} x faster" if planned < paper else f"{planned / paper:.2f} x slower"
        rows.append(
            [row["stage"], f"{planned:,.0f}", f"{paper:,.0f}", times, *rates, f"{int(100 * row['share_measured'])}%"]
        )
    return [
        "projected, beside the paper (arXiv 2511.03929, table 2; its nodes are taken to have 8 H100; it trained in",
        "FP8, this is bfloat16; tokens count padding, as the paper's do)",
        "",
        *_table(rows),
        "",
        *textwrap.wrap(f"measured on H100 GPUs, one or four: {', '.join(MEASURED.values())}", _WIDTH),
        *textwrap.wrap(f"modelled: {', '.join(MODELLED.values())}", _WIDTH),
        "",
    ]


def search_text(plans: Sequence[Plan]) -> str:
    """Layouts, best first."""
    rows = [["layout", "packs/rank", "GiB", "headroom", "fits", "s/step", "tok/s/GPU", "MFU", "hours"]]
    for plan in plans:
        rows.append(
            [
                _layout(plan),
                f"{plan.packs_per_rank}",
                f"{plan.memory.total / GIB:.1f}",
                f"{plan.headroom / GIB:+.1f}",
                _yes(plan.fits),
                f"{plan.time.total:.2f}",
                f"{plan.tokens_per_second_per_gpu:,.0f}",
                f"{plan.mfu:.0%}",
                f"{plan.hours:.1f}",
            ]
        )
    first = plans[0]
    head = f"{_name(first)} on {first.grid.gpus} x {first.gpu.name}: {len(plans)} legal layouts"
    return "\n".join(
        [head, "", *_table(rows), "", *_list(f"warnings for {_layout(first)}", warnings(first)), _calibrated()]
    )


def calibration_text() -> str:
    """Measured against planned, case by case."""
    rows = [["case", "program", "GiB measured", "planned", "error", "s measured", "planned", "error"]]
    for row in compare():
        rows.append(
            [
                str(row["case"]),
                str(row["program"]),
                f"{row['measured_gib']}",
                f"{row['planned_gib']}",
                f"{float(row['memory_error']):+.1%}",
                f"{row['measured_seconds']}",
                f"{row['planned_seconds']}",
                f"{float(row['time_error']):+.1%}",
            ]
        )
    return "\n".join(
        [
            "Measured on H100 80 GB: megatron-core's own layers on four, this project's on one.",
            "",
            *_table(rows),
            "",
            "tp4_16k, tp4_4k_without_sp and unit_visual gave the planner its rates; other times are predictions. Cases",
            "with CP include what their profiles give to exchanging whole Mamba channels; ours does not.",
        ]
    )


def _head(plan: Plan) -> Iterator[str]:
    config, load = plan.config, plan.load
    yield f"{_name(plan)} on {plan.grid.gpus} x {plan.gpu.name} ({plan.grid.nodes} node{'s' * (plan.grid.nodes > 1)})"
    yield (
        f"layout      {_layout(plan)}, {config.trainer.global_batch} packs a step, {plan.packs_per_rank} for each "
        "data parallel rank"
    )
    rows = trainable(config)
    parts = [f"{part} {_count(row.own)} {'trained' if row.whole else 'frozen'}" for part, row in rows.items()]
    yield f"parameters  {_count(sum(row.own for row in rows.values()))}: {', '.join(parts)}"
    if config.adapter.rank:
        yield f"adapters    {_count(sum(row.adapters for row in rows.values()))} of rank {config.adapter.rank}"
        yield trainable_text(config)
    yield (
        f"data        {config.trainer.steps:,} steps of {_count(plan.tokens_per_step)} tokens = "
        f"{_count(plan.tokens_per_step * config.trainer.steps)}, {load.fill:.1%} of it samples"
    )
    yield (
        f"a pack      {config.data.seq_length:,} tokens, {load.samples:.1f} samples, {load.tiles} tiles, "
        f"{load.head_tokens:,} supervised tokens (assumed in workload.*)"
    )
    saved = packing_saves(plan)
    if saved:
        yield (
            f"packing     would hold {saved['samples_per_pack']} samples a pack and save {saved['share_saved']:.0%} "
            "of the time"
        )


def _memory(plan: Plan) -> Iterator[str]:
    room = plan.gpu.memory_bytes / GIB
    pack = f" with a pack of images alone, {plan.heaviest.tiles} tiles" if plan.heaviest.tiles else ""
    yield f"memory of one rank, GiB of {room:.1f}{pack}"
    parts = {**plan.memory.components(), "outside the pool": plan.gpu.outside_pool_bytes}
    yield from _bars({name: value / GIB for name, value in parts.items()}, "{:7.2f}")
    total = sum(parts.values()) / GIB
    verdict = f"{plan.headroom / GIB:.1f} left" if plan.fits else f"{-plan.headroom / GIB:.1f} too much"
    yield f"  {'total':<18}{total:7.2f}  {verdict}"
    if plan.host_bytes:
        yield f"  in host memory      {plan.host_bytes / GIB:5.2f}  of each rank"
    if plan.save_bytes:
        yield f"  and while it saves  {plan.save_bytes / GIB:5.2f}  in host memory, of the rank with most"
    for name, row in would_fit(plan).items():
        yield f"  with {name}: {row['bytes'] / GIB:.1f} GiB in the pool, fits: {_yes(row['fits'])}"


def _time(plan: Plan) -> Iterator[str]:
    yield "seconds of one step"
    yield from _bars(plan.time.components(), "{:7.3f}")
    yield (
        f"  {'total':<18}{plan.time.total:7.3f}  {plan.tokens_per_second_per_gpu:,.0f} useful tokens/s/GPU, "
        f"MFU {plan.mfu:.1%}"
    )
    yield f"  {plan.useful_flops_per_step / 1e15:,.1f} PFLOP of useful work a step, padding and recomputation left out"
    steps, gpu_hours = plan.config.trainer.steps, plan.hours * plan.grid.gpus
    yield f"  {steps:,} steps take {plan.hours:.1f} hours, {gpu_hours:,.0f} GPU-hours"


def _traffic(plan: Plan) -> Iterator[str]:
    yield "traffic past each GPU, a step"
    if not plan.flows:
        yield "  none"
    for flow in plan.flows:
        yield f"  {flow.purpose:<34}{flow.bytes_per_step / 1e9:9.2f} GB  {flow.link:<8} {flow.seconds:7.3f} s"
    every = plan.config.checkpoint.every_steps * plan.time.total / 3600
    yield (
        f"checkpoint {plan.checkpoint_bytes / 1e9:,.1f} GB, {plan.checkpoint_seconds:.0f} s at an assumed 2 GB/s, one "
        f"every {every:.1f} hours; a stop signal has to come a step and a save before the time limit"
    )


def _scaling(plan: Plan) -> Iterator[str]:
    yield "the same layout and batch on other numbers of GPUs (links between nodes are not measured)"
    rows = [["GPUs", "packs/rank", "s/step", "gradients", "fits"]]
    for row in node_scaling(plan):
        rows.append(
            [
                f"{row['gpus']}",
                f"{row['packs_per_rank']}",
                f"{row['step_seconds']:.2f}",
                f"{row['reduce_share']:.1%}",
                _yes(bool(row["fits"])),
            ]
        )
    yield from (f"  {line}" for line in _table(rows))


def _warnings(plan: Plan) -> Iterator[str]:
    yield ""
    yield from _list("warnings", warnings(plan))
    yield _calibrated()


def _calibrated() -> str:
    rows = compare()
    memory = max(abs(float(row["memory_error"])) for row in rows)
    time = max(abs(float(row["time_error"])) for row in rows)
    return (
        f"held against {len(rows)} measured runs: memory within {memory:.0%}, time within {time:.0%} "
        "(nemovl plan --calibration)"
    )


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  - {line}" for line in lines), ""] if lines else []


def _bars(values: Mapping[str, float], form: str) -> Iterator[str]:
    largest = max(values.values()) or 1.0
    for name, value in values.items():
        if value:
            bar = "#" * max(round(_BAR * value / largest), 1)
            yield f"  {name.replace('_', ' '):<18}{form.format(value)}  {bar}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _layout(plan: Plan) -> str:
    grid = plan.grid
    return f"TP {grid.tp}{' + SP' if grid.sequence_parallel else ''} x CP {grid.cp} x DP {grid.dp}"


def _name(plan: Plan) -> str:
    return f"{plan.config.run.name}/{plan.config.run.stage}"


def _count(number: float) -> str:
    """Four digits at most, with the unit that leaves them."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:.0f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
