"""Nodes that the others wait for all along, from a run's own metrics: `python -m nemovl_train.doctor.stragglers RUN`.

A rank writes how long it was busy before it had to wait for the others (`ranks.busy_seconds` of `metrics.jsonl`). Packs
differ, so a single step says little; a node whose busiest rank is slower than the median node's in step after step has
something wrong with it. Imports no torch: it runs between two slices of a job.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemovl_train.doctor.exclude import add_excluded
from nemovl_train.exit_codes import ExitCode, guarded
from nemovl_train.report.watch import STRAGGLER, tail

FEWEST_STEPS, FEWEST_NODES = 10, 3
"""Below these there is no telling a slow node from a heavy pack, or from its neighbour."""
MOST_SHARE = 0.1
"""Of the nodes that are named at once: where more are slow, the cause is not a node."""
_TAIL_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Slow:
    """A node that the others wait for.

    Attributes:
        node: Its name.
        ratio: Busy time of its busiest rank over the median node's: median over steps.
        steps: Steps that this rests on.
    """

    node: str
    ratio: float
    steps: int

    @property
    def reason(self) -> str:
        """As written into an exclude file."""
        return f"{self.ratio:.2f} times as long at work as the median node over {self.steps} steps"


def main(argv: Sequence[str] | None = None) -> int:
    """Names the slow nodes of a run and adds them to an exclude file."""
    parser = argparse.ArgumentParser(
        prog="python -m nemovl_train.doctor.stragglers", description="Slow nodes of a run."
    )
    parser.add_argument("run_dir", type=Path, help="folder of a run or a stage")
    parser.add_argument("--exclude-file", type=Path, help="slow nodes are added to it, one a line")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    found = stragglers(args.run_dir)
    if args.exclude_file and found:
        add_excluded(args.exclude_file, {slow.node: [slow.reason] for slow in found})
    if args.json:
        print(json.dumps([{"node": slow.node, "ratio": slow.ratio, "steps": slow.steps} for slow in found], indent=1))
    else:
        print("\n".join(f"{slow.node}: {slow.reason}" for slow in found) or "no node is slower than the others")
    return ExitCode.OK


def stragglers(folder: Path) -> list[Slow]:
    """Slow nodes since the last start of the stage that wrote last, the slowest first; none where too little is known.

    Args:
        folder: Of a run or a stage.
    """
    stages = (
        [folder] if (folder / "metrics.jsonl").is_file() else [path.parent for path in folder.glob("*/metrics.jsonl")]
    )
    if not stages:
        return []
    stage = max(stages, key=lambda path: (path / "metrics.jsonl").stat().st_mtime)
    starts = [event for event in tail(stage / "events.jsonl", _TAIL_BYTES) if event.get("event") == "start"]
    hosts = starts[-1].get("hosts") if starts else None
    if not hosts:
        return []
    rows = [row for row in tail(stage / "metrics.jsonl", _TAIL_BYTES) if row.get("step", 0) > starts[-1]["step"]]
    return _judge([row["ranks"]["busy_seconds"] for row in rows if row.get("ranks")], hosts)


def _judge(steps: list[list[float]], hosts: list[str]) -> list[Slow]:
    nodes = list(dict.fromkeys(hosts))
    ratios: dict[str, list[float]] = {node: [] for node in nodes}
    for busy in steps:
        if len(busy) != len(hosts):
            continue
        slowest: dict[str, float] = {}
        for node, seconds in zip(hosts, busy, strict=True):
            slowest[node] = max(seconds, slowest.get(node, 0.0))
        usual = statistics.median(slowest.values())
        for node, seconds in slowest.items():
            ratios[node].append(seconds / usual if usual > 0 else 1.0)
    counted = len(ratios[nodes[0]])
    if counted < FEWEST_STEPS or len(nodes) < FEWEST_NODES:
        return []
    typical: dict[str, Any] = {node: statistics.median(values) for node, values in ratios.items()}
    slow = sorted((node for node in nodes if typical[node] > STRAGGLER), key=lambda node: -typical[node])
    if len(slow) > max(1, int(MOST_SHARE * len(nodes))):
        return []
    return [Slow(node, round(typical[node], 3), counted) for node in slow]


if __name__ == "__main__":
    sys.exit(guarded(main))
