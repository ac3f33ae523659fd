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
RECORDS = ("finished.json", "handover.json", "lineage.json")


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("schedule")
    return write_recipes(root / "recipes", data, write_parts(root / "parts"), stages=STAGES, heldout=True)


@pytest.fixture(scope="module")
def whole(recipe, schedule, tmp_path_factory):
    """The end of a schedule that ran through, the seconds it took, and its folder.

    12.7 s on two cores that others used too. No test holds that: on shared cores it says nothing of the schedule.
    """
    root = tmp_path_factory.mktemp("whole")
    schedule(recipe, root / "warm")  # the nursery imports what schedules need
    began = time.monotonic()
    ended = schedule(recipe, root)
    assert ended.codes == [0], ended.texts
    seconds = time.monotonic() - began
    return end_of(root), seconds, root


def end_of(root: Path) -> dict:
    """Hashes of all tensors, counters, rows of every step, held-out scores and records, by stage; and the ledger.

    Folders are part of a config, a config of a seal, and those of two roots differ: a seal stands here as the name of
    the stage whose last checkpoint has it.
    """
    found: dict = {}
    run = root / "chain"
    seals = {}
    for name in ("parts/joined", *STAGES):
        last = sealed.latest(run / name / "checkpoints")
        assert last is not None
        seals[sealed.seal_of(last)] = f"the seal of {name}"
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
            "state": {
                key: value for key, value in state.items() if key not in ("config_hash", "parent", "parent_seal")
            },
            "rows": [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
            "scores": scores["sources"],
            "records": {record: placeless((run / name / record).read_text(), root, seals) for record in RECORDS},
        }
    found["ledger"] = placeless((run / "schedule.json").read_text(), root, seals)
    return found


def placeless(text: str, root: Path, seals: dict[str | None, str]) -> object:
    """A JSON text without the folder that the run is in."""
    text = text.replace(str(root), "ROOT")
    for seal, name in seals.items():
        text = text.replace(str(seal), name)
    return json.loads(text)


def progress(root: Path) -> tuple[int, int]:
    """The last stage that has a good checkpoint, and its step; -1 for the joined parts, -2 for nothing."""
    for number, name in reversed(list(enumerate(["parts/joined", *STAGES]))):
        folder = sealed.latest(root / "chain" / name / "checkpoints")
        if folder is not None:
            return number - 1, int(folder.name.removeprefix("step_"))
    return -2, 0


def test_what_an_end_says(whole):
    end = whole[0]
    assert [stage["state"] for stage in end["ledger"]["stages"]] == ["done"] * len(STAGES)
    assert [stage["parent_seal"] for stage in end["ledger"]["stages"]] == [
        f"the seal of {name}" for name in ("parts/joined", *list(STAGES)[:-1])
    ]
    assert end["ledger"]["stages"][0]["unchanged"] == ["vision", "language"]
    assert len(end["stage4"]["records"]["lineage.json"]) == len(STAGES)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage1/finished.json", '"step": 4', '"step": 3'),
        ("stage0/handover.json", '"changed_tensors": []', '"changed_tensors": ["x"]'),
        ("stage4/lineage.json", '"imported"', '"made"'),
        ("schedule.json", '"unchanged": [\n    "vision",', '"unchanged": ['),
    ],
)
def test_an_end_with_another_record_is_another_end(whole, file, old, new):
    """The control of the trials."""
    end, _, root = whole
    path = root / "chain" / file
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new, 1))
        assert end_of(root) != end
    finally:
        path.write_text(text)
    assert end_of(root) == end


@pytest.mark.parametrize("trial", range(TRIALS))
def test_random_moments_of_five_stages(recipe, schedule, whole, tmp_path, trial):
    end, seconds, _ = whole
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
