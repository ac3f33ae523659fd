"""How two runs are compared: by the bytes that they left."""

import json
from pathlib import Path
from typing import Any

import running

from nemovl_train.checkpoint import sealed
from nemovl_train.config.schema import RunConfig
from nemovl_train.training.folder import StageFolder


def final(config: RunConfig) -> dict[str, Any]:
    """Hashes of weights and optimizer state, counters, and the rows of every step."""
    folder = StageFolder.of(config).last_checkpoint
    files = sealed.verify(folder).integrity["files"]
    tensors = {name: entry["sha256"] for name, entry in files.items() if name.startswith("sharded/")}
    state = json.loads((folder / "state.json").read_text())
    # A folder is part of a config, and theirs differ.
    return {"tensors": tensors, "state": {**state, "config_hash": ""}, "rows": running.rows(config)}


def packs(config: RunConfig) -> dict[int, set[str]]:
    """Digests of the packs of every step, over all ranks; a step that was taken twice had the same ones twice."""
    found: dict[int, set[str]] = {}
    for path in Path(config.run.root).glob("packs_rank*.jsonl"):
        for step, digests in map(json.loads, path.read_text().splitlines()):
            found.setdefault(step, set()).update(digests)
    return found


def last_good_step(config: RunConfig) -> int | None:
    """Step of the newest checkpoint whose seal holds."""
    found = sealed.latest(StageFolder.of(config).checkpoints)
    return None if found is None else int(found.name.removeprefix("step_"))
