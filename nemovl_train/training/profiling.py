"""Where training steps go, on one page, from PyTorch's profiler.

On a GPU the page counts kernels, and the time in which none ran; on a CPU operators, each less the operators it calls.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COLLECTIVES = "collectives"
KINDS = {
    COLLECTIVES: r"nccl|^gloo:",
    "attention": r"fmha|sdpa|flash|attention",
    "scan chain": r"_chunk_|_bmm_chunk|_state_passing|causal_conv1d|_layer_norm_(fwd|bwd)",
    "FP8 casts": r"cast_transpose|block_scaled.*(cast|quant)|quantize",
    "GEMM": r"nvjet|gemm|cutlass|cublas|splitk|::(mm|addmm|bmm|baddbmm|addmv)$|convolution",
    "optimizer": r"multi_tensor|adam|l2norm|_foreach",
    "copies": r"memcpy|memset|copy_kernel|CatArray|::copy_$|::cat$",
    "norm, elementwise": r"rmsnorm|layernorm|ln_(fwd|bwd)|elementwise|reduce|softmax|index|scatter|gather|fill|^aten::",
}
"""First match decides; from kernel names of torch 2.11, Transformer Engine 2.20, mamba-ssm 2.3 and cuDNN 9, and from
PyTorch's names of CPU operators."""
TOP, GAPS = 20, 5
_WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize")


@dataclass(frozen=True)
class Span:
    """A kernel, or a run of an operator between two that it calls; times in milliseconds.

    Attributes:
        calls: 1 in the first span of a call, else 0.
    """

    name: str
    start: float
    end: float
    calls: int = 1


class Recording:
    """Profiles from its making to `stop`, between two points at which the device is idle.

    What ran in between can be read from `spans` and `waits`, and written as a trace.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=kinds)
        self._synchronize()
        self._profiler.start()
        self._began = time.perf_counter()
        self.wall_ms = 0.0

    def stop(self) -> None:
        """Ends it."""
        self._synchronize()
        self.wall_ms = (time.perf_counter() - self._began) * 1e3
        self._profiler.stop()

    def spans(self) -> list[Span]:
        """Kernels on a GPU, operators without what they call on a CPU."""
        events = self._profiler.events()
        if not self._cuda:
            return [span for event in events for span in _own_time(event)]
        # Ranges that somebody named appear beside the kernels in them.
        kernels = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
        return [Span(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in kernels]

    def waits(self) -> list[float]:
        """Milliseconds of each call in which the host waited for the device, those of starting and ending included."""
        return [e.time_range.elapsed_us() / 1e3 for e in self._profiler.events() if _WAITS.match(e.name)]

    def write_trace(self, path: Path) -> None:
        """Everything, for a trace viewer (chrome://tracing, Perfetto); compressed when the name ends in `.gz`."""
        self._profiler.export_chrome_trace(str(path))

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def _own_time(event: Any) -> Iterator[Span]:
    if event.device_type != DeviceType.CPU or not event.name.startswith(("aten::", "gloo:")):
        return
    edges = [event.time_range.start]
    for child in sorted(event.cpu_children, key=lambda c: c.time_range.start):
        edges += [child.time_range.start, child.time_range.end]
    edges.append(event.time_range.end)
    for number, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        yield Span(event.name, start / 1e3, end / 1e3, calls=int(number == 0))


@contextmanager
def recording() -> Iterator[Recording]:
    """A recording of what is inside the `with`."""
    found = Recording()
    yield found
    found.stop()


def profiled(step: Callable[[], None], path: Path, *, title: str, write: bool) -> dict[str, Any]:
    """Runs one more step under the profiler. Collective where the step is.

    Args:
        step: One step.
        path: Text file; further pages are added to its end.
        title: Heading.
        write: Whether this rank writes.

    Returns:
        As `summary`.
    """
    with recording() as found:
        step()
    result = summary(found.spans(), found.wall_ms, waits=found.waits())
    if write:
        with path.open("a") as out:
            out.write(page(title, result))
    return result


def summary(spans: Iterable[Span], wall_ms: float, *, steps: int = 1, waits: Iterable[float] = ()) -> dict[str, Any]:
    """Adds up what ran.

    Args:
        spans: Kernels or operators.
        wall_ms: Time of the whole.
        steps: Steps in it; numbers are of one step, but for the gaps.
        waits: Milliseconds of each wait of the host.

    Returns:
        Milliseconds of a step by the clock, with something running and with nothing; by kind; of collectives those
        during which nothing else ran (`exposed_ms`) and the others (`hidden_ms`), and by name; the longest gaps and
        what came after them; the names with most time; `launches` and `waits` of a step.
    """
    spans = sorted(spans, key=lambda span: span.start)
    kinds: dict[str, float] = defaultdict(float)
    by_name: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for span in spans:
        length = (span.end - span.start) / steps
        kinds[kind_of(span.name)] += length
        by_name[span.name] += length
        calls[span.name] += span.calls
    talking = {name for name in by_name if kind_of(name) == COLLECTIVES}
    busy, work = (merged(spans), merged(span for span in spans if span.name not in talking))
    waited = list(waits)
    return {
        "wall_ms": wall_ms / steps,
        "busy_ms": total(busy) / steps,
        "gap_ms": (wall_ms - total(busy)) / steps,
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "collectives": {
            "exposed_ms": (total(busy) - total(work)) / steps,
            "hidden_ms": sum(by_name[name] for name in talking) - (total(busy) - total(work)) / steps,
            "by_name_ms": {name: by_name[name] for name in _largest(by_name) if name in talking},
        },
        "longest_gaps": _gaps(busy, spans),
        "launches": sum(calls.values()) / steps,
        "waits": len(waited) / steps,
        "waits_ms": sum(waited) / steps,
        "top": [(by_name[name], calls[name] / steps, name) for name in _largest(by_name)[:TOP]],
    }


def _largest(numbers: dict[str, float]) -> list[str]:
    return sorted(numbers, key=numbers.__getitem__, reverse=True)


def merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Times in which at least one of some spans, sorted by their start, ran."""
    found: list[tuple[float, float]] = []
    for span in spans:
        if found and span.start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], span.end))
        else:
            found.append((span.start, span.end))
    return found


def total(times: Iterable[tuple[float, float]]) -> float:
    """Length of separate times."""
    return sum(end - start for start, end in times)


def _gaps(busy: list[tuple[float, float]], spans: list[Span]) -> list[dict[str, Any]]:
    """Longest times between two spans, and the name of what ended each."""
    starts = {span.start: span.name for span in reversed(spans)}
    gaps = [(after[0] - before[1], after[0]) for before, after in itertools.pairwise(busy)]
    return [{"ms": length, "before": starts[start]} for length, start in sorted(gaps, reverse=True)[:GAPS]]


def kind_of(name: str) -> str:
    """Kind of work of a kernel or operator, by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def page(title: str, found: dict[str, Any]) -> str:
    """A summary as text."""
    wall, talk = found["wall_ms"], found["collectives"]
    lines = [
        f"## {title}",
        "",
        f"step {wall:.1f} ms (profiled), something running {found['busy_ms']:.1f} ms, nothing {found['gap_ms']:.1f} ms",
        f"{found['launches']:.0f} launches; the host waited for the device {found['waits']:.0f} times, "
        f"{found['waits_ms']:.1f} ms",
        f"collectives: {talk['exposed_ms']:.1f} ms with nothing else running, {talk['hidden_ms']:.1f} ms behind work",
        "",
        "   ms   of step  kind",
        *(f"{ms:8.1f} {ms / wall:6.1%}  {kind}" for kind, ms in found["kinds_ms"].items()),
        f"{found['gap_ms']:8.1f} {found['gap_ms'] / wall:6.1%}  nothing running",
    ]
    if talk["by_name_ms"]:
        lines += ["", "   ms   of step  collective"]
        lines += [f"{ms:8.1f} {ms / wall:6.1%}  {name[:100]}" for name, ms in talk["by_name_ms"].items()]
    if found["longest_gaps"]:
        lines += ["", "   ms   longest gaps, before"]
        lines += [f"{gap['ms']:8.2f} {gap['before'][:100]}" for gap in found["longest_gaps"]]
    lines += ["", "   ms   of step  launches  kernel or operator"]
    lines += [f"{ms:8.1f} {ms / wall:6.1%} {count:8.0f}  {name[:100]}" for ms, count, name in found["top"]]
    return "\n".join(lines) + "\n\n"
