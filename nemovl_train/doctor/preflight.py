"""Test of all nodes before a run: `python -m launch.node ... -- -m nemovl_train.doctor.preflight`, one process a GPU.

What nodes say travels through the launcher's key-value store, not through collectives: a node that hangs is missed
and named, and takes nobody with it. Collectives come last, each under a time limit.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nemovl_train.doctor.exclude import add_excluded
from nemovl_train.doctor.facts import Gpu, NodeFacts, collect_facts, node_name
from nemovl_train.doctor.judge import as_document, as_text, judge
from nemovl_train.exit_codes import ExitCode, guarded
from nemovl_train.parallel.attempt import own_part

ANSWER_SECONDS = 300
COLLECTIVE_SECONDS = 120
_GPU_BYTES, _CPU_BYTES = 256 * 2**20, 4 * 2**20
_ROUNDS = 5
_LEAVE_SECONDS = 30
_PINGS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of every process.

    Returns:
        `ExitCode.OK`, or `ExitCode.FAILED` on every process when a node is bad.
    """
    parser = argparse.ArgumentParser(prog="python -m nemovl_train.doctor.preflight", description="Test of all nodes.")
    parser.add_argument("--folder", type=Path, required=True, help="where the run will write")
    parser.add_argument("--exclude-file", type=Path, help="bad nodes are added to it, one a line")
    parser.add_argument("--answer-seconds", type=int, default=ANSWER_SECONDS, help="patience with a silent node")
    args = parser.parse_args(argv)
    return _Preflight(args.folder, args.exclude_file, args.answer_seconds).run()


class _Preflight:
    """One process of the test; the first process of a node speaks for it."""

    def __init__(self, folder: Path, exclude_file: Path | None, patience: int) -> None:
        self.folder, self.exclude_file = folder, exclude_file
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank, self.local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        self.node, self.nodes = self.rank // self.local_world, self.world // self.local_world
        self.patience = timedelta(seconds=patience)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        found, _, _ = next(dist.rendezvous("env://", timeout=self.patience))
        self.store = dist.PrefixStore("doctor", own_part(found))

    def run(self) -> int:
        speaks = self.local_rank == 0
        facts = NodeFacts(node=node_name())
        if speaks:
            # First of all, so that a silent node can be named.
            self.store.set(f"name/{self.node}", facts.node)
            facts = collect_facts(self.folder)
            facts.clock_offset = self._clock()
            self.store.set(f"facts/{self.node}", json.dumps(asdict(facts)))
        everyone, missing = self._hear("facts")
        if not missing:
            self._measure(facts)
            if speaks:
                self.store.set(f"rates/{self.node}", json.dumps(asdict(facts)))
            everyone, missing = self._hear("rates")
        if self.rank:
            try:
                code = int(self.store.get("verdict"))
            except (RuntimeError, dist.DistStoreError):
                # The node that judges is the silent one: the first that spoke takes its place.
                spoke = [node for node in range(self.nodes) if self.store.check([f"facts/{node}"])]
                return self._judge(everyone, missing) if speaks and spoke[:1] == [self.node] else ExitCode.FAILED
            self.store.add("left", 1)
            return code
        code = self._judge(everyone, missing)
        self.store.set("verdict", str(int(code)))
        self._wait_for_readers(self.world - 1 - self.local_world * len(missing))
        return code

    def _judge(self, everyone: list[NodeFacts], missing: list[str]) -> ExitCode:
        """Print and write what was found, and add bad nodes to the exclude file."""
        bad = judge(everyone, missing)
        print(as_text(everyone, bad), file=sys.stderr, flush=True)
        (self.folder / "preflight.json").write_text(json.dumps(as_document(everyone, bad), indent=1), encoding="utf-8")
        if bad and self.exclude_file:
            add_excluded(self.exclude_file, bad)
        return ExitCode.FAILED if bad else ExitCode.OK

    def _hear(self, key: str) -> tuple[list[NodeFacts], list[str]]:
        """What every node said under a key, and the names of those that said nothing in time."""
        heard, missing = [], []
        deadline = time.monotonic() + self.patience.total_seconds()
        for node in range(self.nodes):
            left = max(deadline - time.monotonic(), 0.1)
            try:
                self.store.wait([f"{key}/{node}"], timedelta(seconds=left))
                heard.append(parse_facts(self.store.get(f"{key}/{node}")))
            except (RuntimeError, dist.DistStoreError):
                named = self.store.check([f"name/{node}"])
                missing.append(self.store.get(f"name/{node}").decode() if named else f"unnamed-{node}")
        return heard, missing

    def _clock(self) -> float:
        """Seconds that this node's clock is ahead of the first node's: a question and an answer, the quickest of a few.

        The first node answers the others in turn (Cristian's method).
        """
        if self.node == 0:
            for other in range(1, self.nodes):
                for ping in range(_PINGS):
                    try:
                        self.store.wait([f"ask/{other}/{ping}"], self.patience)
                    except (RuntimeError, dist.DistStoreError):
                        break
                    self.store.set(f"tell/{other}/{ping}", repr(time.time()))
            return 0.0
        best = (float("inf"), 0.0)
        for ping in range(_PINGS):
            asked = time.time()
            self.store.set(f"ask/{self.node}/{ping}", "")
            try:
                self.store.wait([f"tell/{self.node}/{ping}"], self.patience)
            except (RuntimeError, dist.DistStoreError):
                return 0.0
            told = float(self.store.get(f"tell/{self.node}/{ping}"))
            heard = time.time()
            best = min(best, (heard - asked, (asked + heard) / 2 - told))
        return best[1]

    def _measure(self, facts: NodeFacts) -> None:
        """All-reduce inside every node, and with both neighbours."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=limit)
        if self.local_world > 1:
            first = [node * self.local_world for node in range(self.nodes)]
            groups = [list(range(start, start + self.local_world)) for start in first]
            facts.all_reduce_rate = self._rate(groups)
        for ring in neighbour_pairs(self.nodes):
            # Same numbered processes of both nodes, so that every adapter of a node is busy.
            lanes = range(self.local_world)
            groups = [[a * self.local_world + lane, b * self.local_world + lane] for a, b in ring for lane in lanes]
            found = self._rate(groups)
            # A good node has a bad neighbour on one side at most of a line of good ones.
            facts.pair_rate = max(filter(None, (facts.pair_rate, found)), default=None)
        dist.destroy_process_group()

    def _rate(self, groups: list[list[int]]) -> float | None:
        """Bytes a second past this process; None when it is in no group. Collective."""
        made = [dist.new_group(ranks) for ranks in groups]
        mine = next((group for group, ranks in zip(made, groups, strict=True) if self.rank in ranks), None)
        if mine is None:
            return None
        size = _GPU_BYTES if self.device.type == "cuda" else _CPU_BYTES
        data = torch.ones(size // 4, dtype=torch.float32, device=self.device)
        seconds = []
        for _ in range(_ROUNDS + 1):
            began = time.perf_counter()
            dist.all_reduce(data, op=dist.ReduceOp.MAX, group=mine)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        ranks = mine.size()
        # The first round sets up connections. Bus bandwidth, as nccl-tests counts it.
        return 2 * (ranks - 1) / ranks * size / min(seconds[1:])

    def _wait_for_readers(self, readers: int) -> None:
        """The store may live in this process: leave after the others have the verdict, or have had time for it."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self.store.add("left", 0) < readers and time.monotonic() < deadline:
            time.sleep(0.05)


def neighbour_pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes in rounds: each node once with the one after it, once with the one before it, where it has one."""
    rounds = [[(a, a + 1) for a in range(start, nodes - 1, 2)] for start in (0, 1)]
    return [pairs for pairs in rounds if pairs]


def parse_facts(text: bytes) -> NodeFacts:
    """A node's facts from the JSON that it sent."""
    values = json.loads(text)
    values["gpus"] = [Gpu(**gpu) for gpu in values["gpus"]]
    return NodeFacts(**values)


if __name__ == "__main__":
    sys.exit(guarded(main))
