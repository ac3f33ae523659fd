"""A schedule of five stages, killed at random moments until it is done: it ends as one that was never killed."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from running import TIMES
from small_schedule import write_parts, write_recipes

from nemovl_train.checkpoint import sealed

pytestmark = pytest.mark.slow

TRIALS = int(os.environ.get("KILL_TRIALS", "50"))
MOST_KILLS = 3
ALL = ["vision", "projector", "language"]
STAGES = {
    "stage0": ("pictures", ["projector"]),
    "stage1": ("pictures", ALL),
    "stage2": ("pictures", ALL),
    "stage3": ("text", ALL),
    "stage4": ("text", ALL),
}
LONGEST_S = 60


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("schedule")
    return write_recipes(root / "recipes", data, write_parts(root / "parts"), stages=STAGES, heldout=True)


@pytest.fixture(scope="module")
def whole(recipe, schedule, tmp_path_factory):
    """The end of a schedule that ran through, and the seconds it took."""
    root = tmp_path_factory.mktemp("whole")
    schedule(recipe, root / "warm")  # the nursery imports what schedules need
    began = time.monotonic()
    ended = schedule(recipe, root)
    assert ended.codes == [0], ended.texts
    return end_of(root), time.monotonic() - began


def end_of(root: Path) -> dict:
    """Hashes of all tensors, counters, rows of every step and held-out scores, by stage; and what the ledger says."""
    found: dict = {}
    run = root / "chain"
    for name in STAGES:
        folder = sealed.latest(run / name / "checkpoints")
        assert folder is not None
        files = sealed.verify(folder).integrity["files"]
        state = json.loads((folder / "state.json").read_text())
        rows = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        scores = json.loads((run / name / "evaluation.json").read_text())
        found[name] = {
            "checkpoint": folder.name,
            "tensors": {file: entry["sha256"] for file, entry in files.items() if file.startswith("sharded/")},
            # Folders are part of a config and of a parent's name, and those of two roots differ.
            "state": {
                key: value for key, value in state.items() if key not in ("config_hash", "parent", "parent_seal")
            },
            "rows": [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
            "scores": scores["sources"],
        }
    ledger = json.loads((run / "schedule.json").read_text())
    found["states"] = [stage["state"] for stage in ledger["stages"]]
    return found


def progress(root: Path) -> tuple[int, int]:
    """The last stage that has a good checkpoint, and its step; -1 for the joined parts, -2 for nothing."""
    for number, name in reversed(list(enumerate(["parts/joined", *STAGES]))):
        folder = sealed.latest(root / "chain" / name / "checkpoints")
        if folder is not None:
            return number - 1, int(folder.name.removeprefix("step_"))
    return -2, 0


def test_it_is_short(whole):
    end, seconds = whole
    assert seconds < LONGEST_S
    assert end["states"] == ["done"] * len(STAGES)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_random_moments_of_five_stages(recipe, schedule, whole, tmp_path, trial):
    end, seconds = whole
    chance, seen = random.Random(trial), (-2, 0)
    for _ in range(MOST_KILLS):
        (code,) = schedule(recipe, tmp_path, kill_after_s=chance.uniform(0.02, 0.9) * seconds).codes
        good = progress(tmp_path)
        assert good >= seen
        seen = good
        if code == 0:
            break
        assert code == -9
    ended = schedule(recipe, tmp_path)
    assert ended.codes == [0], ended.texts
    assert end_of(tmp_path) == end
    shutil.rmtree(tmp_path)
