"""GPU-hours of the published schedule, planned, beside what its authors report, and how much of them is measured.

The paper (arXiv 2511.03929, table 2) gives nodes and hours of each stage. That nodes have 8 GPUs, and that the 32 nodes
are stage 0's and the 64 the others', is our reading of it. It trained in FP8, plans are of bfloat16 as recipes are.
"""

from collections.abc import Sequence
from typing import Any

from nemovl_train.plan.planner import Plan

GPUS_PER_NODE = 8
PAPER = {
    "stage0_projector_warmup": (32, 6.0),
    "stage1_sft_16k": (64, 30.0),
    "stage2_video_sft_49k": (64, 15.0),
    "stage3_code_recovery_49k": (64, 3.5),
    "stage4_long_context_300k": (64, 5.5),
}
"""Nodes and hours by stage of `nano_12b_v2_vl`."""
MODEL = "nano_12b_v2_vl"

MEASURED = {
    "matrices": "matrix products",
    "attention": "attention",
    "mixer": "scan",
    "elementwise": "norms and additions",
    "vision": "tower and projector",
    "update": "optimizer",
    "tensor_parallel": "exchange between tensor parallel ranks of a node",
}
"""Components of a step whose rates come from profiled or timed steps on H100 GPUs (`calibration.py`)."""
MODELLED = {
    "features": "exchange of features",
    "context_parallel": "exchange between context parallel ranks",
    "host": "waiting for the host",
    "state_copies": "optimizer state to host memory and back",
    "reduce": "gradients and weights over data parallel ranks, nothing of it hidden",
}
"""Those that are bytes or FLOPs over an assumed rate."""


def projection(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """A row for each stage that the paper has, and their sum.

    Tokens a second and GPU count whole packs, padding included, since the paper's tokens do.

    Args:
        plans: Stages of a schedule.

    Returns:
        Empty for other schedules.
    """
    rows = [_row(plan) for plan in plans if plan.config.run.name == MODEL and plan.config.run.stage in PAPER]
    if not rows:
        return []
    total = {key: sum(row[key] for row in rows) for key in ("gpu_hours", "paper_gpu_hours", "measured_gpu_hours")}
    return [*rows, {"stage": "all", **total, "share_measured": total["measured_gpu_hours"] / total["gpu_hours"]}]


def _row(plan: Plan) -> dict[str, Any]:
    nodes, hours = PAPER[plan.config.run.stage]
    paper = nodes * hours * GPUS_PER_NODE
    planned = plan.hours * plan.grid.gpus
    tokens = plan.tokens_per_step * plan.config.trainer.steps
    measured = plan.gpu.measured and sum(plan.time.components()[name] for name in MEASURED) / plan.time.total
    return {
        "stage": plan.config.run.stage,
        "gpu_hours": planned,
        "paper_gpu_hours": paper,
        "tokens_per_second_per_gpu": tokens / planned / 3600,
        "paper_tokens_per_second_per_gpu": tokens / paper / 3600,
        "measured_gpu_hours": planned * measured,
        "share_measured": float(measured),
    }
