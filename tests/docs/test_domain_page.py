"""docs/domain_finetune.md as a reader runs it: its own commands, in order, on the demo's model, and what they promise.

A few minutes behind a finished demo (`NEMOVL_DEMO_RUN=runs/tiny`), which takes ten more where there is none.
"""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/domain_finetune.md").read_text()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
MINUTES = 5


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, (command, done.stdout)
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which every command of the page ran, what each printed, and how long they took."""
    folder = tmp_path_factory.mktemp("domain")
    ready = os.environ.get("NEMOVL_DEMO_RUN")
    if not ready:
        run(folder, "-m", "nemovl_train.cli", "schedule", "recipe=tiny/schedule")
        ready = str(folder / "runs/tiny")
    if not (folder / "runs/tiny/hf").exists():
        shutil.copytree(Path(ready) / "hf", folder / "runs/tiny/hf")
    began, printed = children_seconds(), {}
    text = PAGE.partition("## At full size")[0]
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            run(folder, "-c", block)
            continue
        for line in block.splitlines():
            words = shlex.split(line)
            if words[0] == "nemovl":
                printed[line] = run(folder, "-m", "nemovl_train.cli", *words[1:])
    return folder, printed, children_seconds() - began


def children_seconds() -> float:
    """Processor time of what this process started. One thread each, one after the other: on idle cores, the clock's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def exact_match(folder: Path, stage: str) -> float:
    return json.loads((folder / f"runs/domain/{stage}/evaluation.json").read_text())["sources"]["domain"]["exact_match"]


@pytest.mark.parametrize("stage", ["full", "lora"])
def test_held_out_answers_get_better(finished, stage):
    assert exact_match(finished[0], stage) - exact_match(finished[0], "before") >= 0.4


def test_the_page_takes_minutes(finished):
    assert finished[2] < 60 * MINUTES


def test_the_exported_model_answers(finished):
    folder, printed, _ = finished
    (answer,) = [text for line, text in printed.items() if line.startswith("nemovl generate")]
    rows = (folder / "lamps/heldout/metadata.jsonl").read_text().splitlines()
    assert answer.strip() == json.loads(rows[0])["answer"]


def test_every_way_out_is_there(finished):
    folder = finished[0]
    assert json.loads((folder / "domain_hf/verification.json").read_text())["ok"]
    merged = [folder / name for name in ("domain_lora_hf/model.safetensors", "domain_peft/adapter_model.safetensors")]
    assert all(path.is_file() for path in merged)
    assert (folder / "runs/domain/report.html").is_file()
    assert next((folder / "runs/domain/merged/checkpoints").glob("step_*/COMPLETE")).is_file()
