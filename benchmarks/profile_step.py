"""Where a training step goes, on one page, from PyTorch's profiler."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

KINDS = {
    "collectives": r"nccl",
    "attention": r"fmha|sdpa|flash|attention",
    "scan chain": r"_chunk_|_bmm_chunk|_state_passing|causal_conv1d|_layer_norm_(fwd|bwd)",
    "GEMM": r"nvjet|gemm|cutlass|cublas|splitk|::mm|addmm",
    "optimizer": r"multi_tensor|adam|l2norm",
    "copies": r"memcpy|memset|copy_kernel|CatArray",
    "norm, elementwise": r"rmsnorm|layernorm|ln_(fwd|bwd)|elementwise|reduce|softmax|index|scatter|gather|fill",
}
"""First match decides; from kernel names of torch 2.11, Transformer Engine 2.20, mamba-ssm 2.3 and cuDNN 9."""
TOP = 25


def profiled(step: Callable[[], None], path: Path, *, title: str, write: bool) -> dict[str, Any]:
    """Runs one more step under the profiler. Collective: every rank runs the step.

    Args:
        step: One step.
        path: Text file; further cases are added to its end.
        title: Heading.
        write: Whether this rank writes.

    Returns:
        Milliseconds by kind of kernel, of the step and of the gaps in which no kernel ran.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - began) * 1e3
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    # Ranges that somebody named appear beside the kernels in them.
    events = [e for e in profiler.events() if e.device_type == device and not e.is_user_annotation]
    found = summary([(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in events], wall)
    if write:
        with path.open("a") as out:
            out.write(page(title, found))
    return found


def summary(kernels: Iterable[tuple[str, float, float]], wall: float) -> dict[str, Any]:
    """Adds up kernels (name, start, end in milliseconds) of a step that took `wall` milliseconds."""
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    spans = []
    for name, start, end in kernels:
        kinds[kind_of(name)] += end - start
        names[name].append(end - start)
        spans.append((start, end))
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    top = sorted(((sum(times), len(times), name) for name, times in names.items()), reverse=True)[:TOP]
    return {
        "wall_ms": wall,
        "busy_ms": busy,
        "gap_ms": wall - busy,
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "launches": len(spans),
        "top": top,
    }


def kind_of(kernel: str) -> str:
    """Kind of work of a kernel, by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"


def page(title: str, found: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [f"## {title}", ""]
    lines.append(
        f"step {found['wall_ms']:.1f} ms (profiled), a kernel running {found['busy_ms']:.1f} ms, none "
        f"{found['gap_ms']:.1f} ms, {found['launches']} launches"
    )
    lines += ["", "   ms   of step  kind"]
    lines += [f"{ms:8.1f} {ms / found['wall_ms']:6.1%}  {kind}" for kind, ms in found["kinds_ms"].items()]
    lines += ["", "   ms   of step  launches  kernel"]
    lines += [f"{ms:8.1f} {ms / found['wall_ms']:6.1%} {count:8d}  {name[:110]}" for ms, count, name in found["top"]]
    return "\n".join(lines) + "\n\n"
