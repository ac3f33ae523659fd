"""The demo as a person runs it, at its real size: what it promises, the README's commands, and kill -9 at any moment.

Ten minutes a run on two cores, so all of it is slow. `NEMOVL_DEMO_RUN=runs/tiny` reuses a finished demo.
"""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from nemovl_train.checkpoint import sealed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STAGES = [f"stage{n}" for n in range(5)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def nemovl(folder: Path, *words: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "nemovl_train.cli", *words]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with `runs/tiny` of an uninterrupted demo."""
    folder = tmp_path_factory.mktemp("demo")
    ready = os.environ.get("NEMOVL_DEMO_RUN")
    if ready:
        shutil.copytree(ready, folder / "runs/tiny")
    else:
        assert nemovl(folder, "schedule", "recipe=tiny/schedule").wait() == 0
    return folder


def evaluation(folder: Path, stage: str) -> dict:
    (path,) = (folder / "runs/tiny").glob(f"{stage}_*/evaluation.json")
    return json.loads(path.read_text())["sources"]


def losses(folder: Path, stage: str) -> list[float]:
    (path,) = (folder / "runs/tiny").glob(f"{stage}_*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "runs/tiny/hf/model.safetensors").read_bytes()).hexdigest()


def test_digits_are_read_after_stage_1_and_not_before(finished):
    assert evaluation(finished, "stage1")["digits_read"]["exact_match"] >= 0.8
    assert evaluation(finished, "stage0")["digits_read"]["exact_match"] < 0.4


def test_code_recovers_in_stage_3(finished):
    assert evaluation(finished, "stage3")["code"]["loss"] < evaluation(finished, "stage2")["code"]["loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_of_every_stage_falls(finished, stage):
    curve = losses(finished, stage)
    part = max(2, len(curve) // 5)
    assert sum(curve[-part:]) < sum(curve[:part])


def test_the_exported_folder_is_verified(finished):
    card = json.loads((finished / "runs/tiny/hf/verification.json").read_text())
    assert card["ok"]


def test_a_finished_demo_has_nothing_left_to_do(finished):
    before = weights_hash(finished)
    process = nemovl(finished, "schedule", "recipe=tiny/schedule", stderr=subprocess.PIPE, text=True)
    assert "nothing left to do" in process.communicate()[1]
    assert process.returncode == 0
    assert weights_hash(finished) == before


def write_photos(folder: Path) -> None:
    """What a reader brings: pictures, and a question with its answer for each."""
    folder.mkdir()
    rows = []
    for number in range(6):
        Image.new("RGB", (80, 60), (40 * number, 90, 120)).save(folder / f"{number}.jpg")
        rows.append({"file_name": f"{number}.jpg", "question": "How bright is it?", "answer": f"{number} of 5"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_commands_of_the_readme_run(finished):
    """Every `nemovl` line, in order, as written; a run that the README starts takes two steps here instead of many."""
    write_photos(finished / "photos")
    text = (ROOT / "README.md").read_text()
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    commands = [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and "nemovl" in words[0]]
    assert len(commands) >= 6
    for words in commands:
        short = ["trainer.steps=2"] if words[0] == "train" and "--cfg" not in words else []
        assert nemovl(finished, *words, *short, stdout=subprocess.DEVNULL).wait() == 0, words


def good_checkpoints(folder: Path) -> dict[str, int]:
    """Step of the newest checkpoint whose seal holds, by what was trained."""
    roots = sorted((folder / "runs/tiny").glob("**/checkpoints"))
    found = {str(root.relative_to(folder)): sealed.latest(root) for root in roots}
    return {name: int(path.name.removeprefix("step_")) for name, path in found.items() if path is not None}


@pytest.mark.parametrize("trial", range(3))
def test_killed_at_random_moments_it_ends_with_the_same_weights(finished, tmp_path, trial):
    chance, seen = random.Random(11 + trial), {}
    for _ in range(4):
        process = nemovl(tmp_path, "schedule", "recipe=tiny/schedule", stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(30, 150))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        good = good_checkpoints(tmp_path)
        assert all(good.get(name, -1) >= step for name, step in seen.items())
        seen = good
    assert seen
    assert nemovl(tmp_path, "schedule", "recipe=tiny/schedule").wait() == 0
    assert weights_hash(tmp_path) == weights_hash(finished)
