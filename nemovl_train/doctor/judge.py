"""Which nodes are bad: a pure function of what all of them said. Nodes are compared with the most of them."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from nemovl_train.doctor.facts import NodeFacts

SLOW = 0.6
"""A node with less than this share of the median rate is slow."""
MAX_CLOCK_OFFSET = 5.0
"""Seconds. Clocks decide which of two files is newer, and the order of lines in logs."""
MIN_OPEN_FILES = 4096
"""Shards, checkpoint files and sockets of one process."""
MIN_SHARED_MEMORY = 4 * 2**30
"""Packs on their way from data workers to 8 processes."""
_MOST_NAMED = 8


def judge(facts: Sequence[NodeFacts], missing: Sequence[str] = ()) -> dict[str, list[str]]:
    """Reasons against nodes.

    Args:
        facts: What the nodes said.
        missing: Nodes that said nothing in time.

    Returns:
        One sentence for each reason, by node; empty when all nodes are good.
    """
    bad: dict[str, list[str]] = {name: ["did not answer in time"] for name in missing}
    for check in (_alone, _alike, _rates):
        for node, reason in check(facts):
            bad.setdefault(node, []).append(reason)
    return bad


def _alone(facts: Sequence[NodeFacts]) -> Iterator[tuple[str, str]]:
    """What is wrong whatever the others have."""
    for node in facts:
        for problem in node.problems:
            yield node.node, problem
        errors = sum(gpu.ecc_errors for gpu in node.gpus)
        if errors:
            yield node.node, f"{errors} uncorrected memory errors of its GPUs"
        slow_links = {kind: count for kind, count in node.links.items() if kind != "NVLink"}
        if slow_links and "NVLink" in node.links:
            pairs = ", ".join(f"{count} over {kind}" for kind, count in slow_links.items())
            yield node.node, f"pairs of GPUs without NVLink: {pairs}"
        if node.open_files < MIN_OPEN_FILES:
            yield node.node, f"{node.open_files} open files at most; set ulimit -n {MIN_OPEN_FILES} or more"
        if node.gpus and node.shared_memory_bytes < MIN_SHARED_MEMORY:
            yield node.node, f"shared memory has {node.shared_memory_bytes / 2**30:.1f} GiB; data workers need 4"
        if abs(node.clock_offset) > MAX_CLOCK_OFFSET:
            yield node.node, f"its clock is off by {node.clock_offset:+.1f} s"


def _alike(facts: Sequence[NodeFacts]) -> Iterator[tuple[str, str]]:
    """What must be the same everywhere; the most frequent value is taken to be right."""
    found: dict[str, list[object]] = {
        "GPUs": [tuple(gpu.name for gpu in node.gpus) for node in facts],
        "driver": [tuple(sorted({gpu.driver for gpu in node.gpus})) for node in facts],
        "links": [tuple(sorted(node.links.items())) for node in facts],
    }
    for name in sorted({name for node in facts for name in node.versions}):
        found[name] = [node.versions.get(name) for node in facts]
    for what, values in found.items():
        usual = Counter(values).most_common(1)[0][0] if values else None
        for node, value in zip(facts, values, strict=True):
            if value != usual:
                yield node.node, f"{what}: {_short(value)}, other nodes have {_short(usual)}"


def _rates(facts: Sequence[NodeFacts]) -> Iterator[tuple[str, str]]:
    for key, what in (
        ("all_reduce_rate", "all-reduce inside the node"),
        ("pair_rate", "all-reduce with its neighbours"),
        ("write_rate", "writing to the run folder"),
    ):
        rates = {node.node: rate for node in facts if (rate := getattr(node, key)) is not None}
        # Two nodes cannot tell which of them is the slow one.
        if len(rates) < 3:
            continue
        median = statistics.median(rates.values())
        for name, rate in rates.items():
            if rate < SLOW * median:
                yield name, f"{what}: {rate / 1e9:.2f} GB/s, the median is {median / 1e9:.2f}"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        counts = Counter(str(item) for item in value)
        return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items()) or "none"
    return str(value)


def as_text(facts: Sequence[NodeFacts], bad: dict[str, list[str]]) -> str:
    """One line a node, then the reasons."""
    lines = [f"{'node':<24}{'GPUs':>5}{'inside GB/s':>13}{'pair GB/s':>11}{'write GB/s':>12}{'clock s':>9}{'files':>9}"]
    for node in facts:
        inside, pair = _rate(node.all_reduce_rate), _rate(node.pair_rate)
        lines.append(
            f"{node.node:<24}{len(node.gpus):>5}{inside:>13}{pair:>11}{_rate(node.write_rate):>12}"
            f"{node.clock_offset:>+9.2f}{node.open_files:>9}{'  BAD' if node.node in bad else ''}"
        )
    for name, reasons in bad.items():
        lines += [f"bad node {name}: {reason}" for reason in reasons[:_MOST_NAMED]]
    return "\n".join(lines)


def as_document(facts: Sequence[NodeFacts], bad: dict[str, list[str]]) -> dict[str, object]:
    """The same as plain values."""
    return {"ok": not bad, "nodes": [asdict(node) for node in facts], "bad": bad}


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"
