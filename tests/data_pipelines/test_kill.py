"""The loader killed at random moments, with the position in a file as all that survives.

Every start has another number of ranks and workers, as on a cluster that shrinks and grows.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from data_pipelines.loader import PackStream

BATCH, STEPS = 6, 60
SCHEDULE = [(4, 1), (3, 0), (6, 1), (8, 0), (1, 2)]
"""(ranks, workers of the first rank) of each start; 4 and 8 ranks do not divide the batch."""

READER = """
import json, os, sys, time
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.loader import PackStream

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    sources = {name: SourceConfig(**source) for name, source in options.pop("sources").items()}
    for name in ("loss", "cost", "read", "shuffle"):
        del options[name]
    log, steps, ranks = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    lines = open(log).read().splitlines() if os.path.exists(log) else []
    done = json.loads(lines[-1])["packs_consumed"] if lines else 0
    config, alone = DataConfig(sources=sources, **options), DataConfig(sources=sources, **options | {"num_workers": 0})
    streams = [
        PackStream(
            alone if rank else config, tokens_per_tile=4, seed=5, global_batch=6, dp_rank=rank, dp_size=ranks,
            start_pack=done,
        )
        for rank in range(ranks)
    ]
    with open(log, "a") as file:
        for _ in range(steps - len(lines)):
            packs = [pack for same in zip(*map(next, streams)) for pack in same if pack.index >= 0]
            digests = [pack.digest() for pack in packs]
            file.write(json.dumps({"packs_consumed": streams[0].packs_consumed, "digests": digests}) + "\\n")
            file.flush()
            time.sleep(0.05)
    for stream in streams:
        stream.close()
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path, mixed_folder, configure):
    log, script = tmp_path / "log.jsonl", tmp_path / "reader.py"
    script.write_text(READER)
    chance = random.Random(7)
    kills = 0
    for ranks, workers in SCHEDULE:
        settings = json.dumps(asdict(configure({"mixed": mixed_folder}, num_workers=workers)))
        command = [sys.executable, str(script), settings, str(log), str(STEPS), str(ranks)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, start_new_session=True)
        before = len(log.read_text().splitlines()) if log.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) > before:
                time.sleep(chance.uniform(0, 0.6))
                break
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, "workers leave when their trainer is gone"
    assert kills >= 4
    lines = log.read_text().splitlines()
    subprocess.run([*command[:-1], "4"], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert len(lines) < STEPS, "the last start had something left to do"
    seen = [digest for line in log.read_text().splitlines() for digest in json.loads(line)["digests"]]
    straight = PackStream(configure({"mixed": mixed_folder}), tokens_per_tile=4, seed=5, global_batch=BATCH)
    assert seen == [pack.digest() for _ in range(STEPS) for pack in next(straight)]
