"""Two stages, one after the other: ledger, parents, interruptions, refusals, publication."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from small_schedule import compose, write_recipes

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.lineage import lineage_of
from nemovl_train.config.compose import compose_stage
from nemovl_train.convert import checkpoints as convert_checkpoints
from nemovl_train.convert import verify as convert_verify
from nemovl_train.convert.checkpoints import checkpoint_tensors
from nemovl_train.convert.described import describe_checkpoint
from nemovl_train.exceptions import CheckpointError, ConfigError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.report import html
from nemovl_train.schedule import chain
from nemovl_train.schedule.ledger import Ledger, StageEntry
from nemovl_train.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(data, parts, tmp_path):
    return write_recipes(tmp_path / "recipes", data, parts)


@pytest.fixture(scope="module")
def finished(data, parts, tmp_path_factory):
    """A chain that ran through."""
    root = tmp_path_factory.mktemp("finished")
    recipe = write_recipes(root / "recipes", data, parts)
    assert chain.run(compose(recipe, root / "runs")) == ExitCode.OK
    return recipe, root / "runs" / "chain"


def ledger(run):
    return json.loads((run / "schedule.json").read_text())["stages"]


def tensors(checkpoint):
    _, found = checkpoint_tensors(checkpoint)
    return {name: tensor.clone() for name, tensor in found}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def stamps(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_the_ledger_and_the_parents(finished):
    recipe, run = finished
    folder = recipe.parent
    assert ledger(run) == [
        {
            "name": "first",
            "recipe": str(folder / "first.yaml"),
            "state": "done",
            "parent": "parts/joined/checkpoints/step_00000000",
            "checkpoint": "first/checkpoints/step_00000004",
            "parent_seal": (run / "parts/joined/checkpoints/step_00000000/COMPLETE").read_text().strip(),
            "unchanged": ["vision", "language"],
            "evaluation": None,
        },
        {
            "name": "second",
            "recipe": str(folder / "second.yaml"),
            "state": "done",
            "parent": "first/checkpoints/step_00000004",
            "checkpoint": "second/checkpoints/step_00000004",
            "parent_seal": (run / "first/checkpoints/step_00000004/COMPLETE").read_text().strip(),
            "unchanged": [],
            "evaluation": None,
        },
    ]
    states = [json.loads((run / stage["checkpoint"] / "state.json").read_text()) for stage in ledger(run)]
    assert [state["parent"] for state in states] == [str(run / stage["parent"]) for stage in ledger(run)]
    assert [state["step"] for state in states] == [4, 4]
    assert json.loads((run / "environment.json").read_text())["python"]


def test_a_model_card_names_every_ancestor(finished):
    _, run = finished
    first, second = (run / stage["checkpoint"] for stage in ledger(run))
    seals = [(run / stage["parent"] / "COMPLETE").read_text().strip() for stage in ledger(run)]
    source = json.loads((run / "parts/joined/checkpoints/step_00000000/state.json").read_text())["source"]
    origin = {"imported": source, "integrity": seals[0]}
    chain_of_second = [
        {"stage": "chain/first", "step": 4, "trained": ["projector"], "integrity": seals[1]},
        origin,
    ]
    assert describe_checkpoint(first).facts["lineage"] == [origin]
    assert describe_checkpoint(second).facts["lineage"] == chain_of_second
    # The record of the start is enough where the ancestors have gone; without it they are asked.
    hidden = first.rename(first.with_name("hidden"))
    try:
        assert lineage_of(second) == chain_of_second
    finally:
        hidden.rename(first)
    for stage in (first, second):
        (stage.parents[1] / "lineage.json").rename(stage.parents[1] / "kept")
    try:
        assert lineage_of(second) == chain_of_second
    finally:
        for stage in (first, second):
            (stage.parents[1] / "kept").rename(stage.parents[1] / "lineage.json")


def test_each_stage_starts_from_the_weights_of_the_one_before(finished):
    _, run = finished
    joined = tensors(run / "parts" / "joined")
    first, second = (tensors(run / stage["checkpoint"]) for stage in ledger(run))
    changed = {name for name in joined if not torch.equal(joined[name], first[name])}
    assert changed == {name for name in joined if name.startswith("projector.")}
    # The second stage has no images: its tower and projector only decay, its language model learns.
    moved = {name for name in joined if not torch.equal(first[name], second[name])}
    assert {name for name in first if name.startswith("language_model.")} <= moved


def test_a_parent_that_was_made_again_is_refused(finished):
    recipe, run = finished
    record = run / "schedule.json"
    before = record.read_text()
    seal = (run / "first/checkpoints/step_00000004/COMPLETE").read_text().strip()
    record.write_text(before.replace(seal, "0" * 64))
    try:
        with pytest.raises(ConfigError, match="started from other weights than"):
            chain.run(compose(recipe, run.parent))
    finally:
        record.write_text(before)


def test_a_finished_stage_needs_no_parent(finished):
    recipe, run = finished
    marker = run / "first/checkpoints/step_00000004/COMPLETE"
    before = ledger(run)
    entry = Ledger.open(run / "schedule.json", [StageEntry(e["name"], e["recipe"]) for e in before]).stages[1]
    hidden = marker.rename(marker.with_name("HIDDEN"))
    try:
        stage = compose_stage(compose(recipe, run.parent), compose(recipe, run.parent).stages[1])
        stage = replace(stage, trainer=replace(stage.trainer, init_from=str(marker.parent)))
        assert chain._stage(stage, entry, Ledger(run / "schedule.json", [entry]), run) == ExitCode.OK
    finally:
        hidden.rename(marker)
    assert entry.parent_seal == before[1]["parent_seal"]


def test_a_second_run_does_nothing(finished, monkeypatch):
    recipe, run = finished
    before = stamps(run)

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(Trainer, "__init__", refuse)
    assert chain.run(compose(recipe, run.parent)) == ExitCode.OK
    changed = {path.name for path, stamp in stamps(run).items() if before.get(path) != stamp}
    assert changed <= {"config.yaml", ".lock"}


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_interrupted_in_the_second_stage_it_ends_the_same(finished, recipe, tmp_path, monkeypatch, how):
    account = Trainer._account

    def interrupted(self, *args):
        account(self, *args)
        if self.config.run.stage == "second" and self.state.step == 3:
            if how == "killed":
                self.control.finish_save()  # of step 2, which is written in the background
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_account", interrupted)
    config, run = compose(recipe, tmp_path / "runs"), tmp_path / "runs" / "chain"
    if how == "killed":
        with pytest.raises(KeyboardInterrupt):
            chain.run(config)
    else:
        assert chain.run(config) == ExitCode.REQUEUE
    assert [stage["state"] for stage in ledger(run)] == ["done", "running"]
    first = stamps(run / "first" / "checkpoints")
    monkeypatch.undo()
    assert chain.run(config) == ExitCode.OK
    assert stamps(run / "first" / "checkpoints") == first
    assert [stage["state"] for stage in ledger(run)] == ["done", "done"]
    events = [json.loads(line) for line in (run / "second" / "events.jsonl").read_text().splitlines()]
    starts = [event["resumed_from_step"] for event in events if event["event"] == "start"]
    assert starts == [0, 2 if how == "killed" else 3]
    assert_equal(*(tensors(r / "second" / "checkpoints" / "step_00000004") for r in (run, finished[1])))


def test_a_signal_in_the_last_step_of_a_stage_stops_the_chain(recipe, tmp_path, monkeypatch):
    account = Trainer._account

    def interrupted(self, *args):
        account(self, *args)
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_account", interrupted)
    assert chain.run(compose(recipe, tmp_path / "runs")) == ExitCode.REQUEUE
    assert [stage["state"] for stage in ledger(tmp_path / "runs" / "chain")] == ["running", "pending"]


def test_other_stages_in_the_run_folder_are_refused(finished, tmp_path):
    recipe, run = finished
    content = yaml.safe_load(recipe.read_text())
    content["stages"] = content["stages"][:1]
    other = tmp_path / "other.yaml"
    other.write_text("# @package _global_\n" + yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError, match=r"holds another schedule(.|\n)*choose another run.name"):
        chain.run(compose(other, run.parent))


def test_changed_options_of_a_finished_stage_are_refused(finished, data, parts):
    recipe, run = finished
    first = recipe.parent / "first.yaml"
    text = first.read_text()
    first.write_text(text.replace("lr: 0.003", "lr: 0.004"))
    try:
        with pytest.raises(ConfigError, match=r"optim.lr: 0.003 -> 0.004"):
            chain.run(compose(recipe, run.parent))
    finally:
        first.write_text(text)


def test_an_import_that_was_cut_off_is_made_again(finished, recipe, tmp_path, monkeypatch):
    def cut_off(*args, **options):
        raise KeyboardInterrupt

    seal = sealed.seal
    monkeypatch.setattr(sealed, "seal", cut_off)
    config, run = compose(recipe, tmp_path / "runs"), tmp_path / "runs" / "chain"
    with pytest.raises(KeyboardInterrupt):
        chain.run(config)
    checkpoints = run / "parts" / "joined" / "checkpoints"
    assert not list(checkpoints.glob("step_*"))
    (checkpoints / ".writing_step_00000000" / "sharded").mkdir(parents=True)  # as a killed process leaves it
    monkeypatch.setattr(sealed, "seal", seal)
    assert chain.prepare_parts(config, run) == ExitCode.OK
    assert not list(checkpoints.glob(".writing_*"))
    assert_equal(tensors(run / "parts" / "joined"), tensors(finished[1] / "parts" / "joined"))


def test_a_missing_part_is_named(recipe, tmp_path):
    content = yaml.safe_load(recipe.read_text())
    content["parts"]["vision"] = str(tmp_path / "nowhere")
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError, match=r"parts\.vision=.*nowhere.*config\.json is missing"):
        chain.run(compose(recipe, tmp_path / "runs"))


def test_a_run_folder_that_cannot_be_made(recipe, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "chain").write_text("in the way")
    with pytest.raises(CheckpointError, match="is a file"):
        chain.run(compose(recipe, tmp_path / "runs"))


class Published:
    """Stands in for export, verification and report, and counts them."""

    def __init__(self, monkeypatch, *, ok):
        self.calls, self.ok = [], ok
        monkeypatch.setattr(convert_checkpoints, "export_checkpoint", self.export)
        monkeypatch.setattr(convert_verify, "verify", self.verify)
        monkeypatch.setattr(html, "write_report", self.report)

    def export(self, source, out, *, overwrite):
        assert overwrite
        self.calls.append("export")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    def verify(self, out, *, reference):
        self.calls.append("verify")
        card = {"ok": self.ok}
        (out / "verification.json").write_text(json.dumps(card))
        return card

    def report(self, root):
        self.calls.append("report")
        return root / "report.html"


def test_publication_is_done_once_and_a_failed_verification_is_a_failure(tmp_path, monkeypatch, caplog):
    published = Published(monkeypatch, ok=False)
    checkpoint = sealed_checkpoint(tmp_path, "a")

    def publish():
        return chain._publish(tmp_path, checkpoint, Ledger.open(tmp_path / "schedule.json", []))

    assert publish() == ExitCode.FAILED
    assert str(tmp_path / "hf" / "verification.md") in caplog.text
    assert publish() == ExitCode.FAILED
    published.ok = True
    (tmp_path / "hf" / "verification.json").write_text('{"ok": tr')  # cut off
    assert publish() == ExitCode.OK
    assert publish() == ExitCode.OK
    verify_and_report = ["verify", "report"]
    assert published.calls == ["export", *verify_and_report, *verify_and_report, *verify_and_report, "report"]


def sealed_checkpoint(root, seal):
    checkpoint = root / "second" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "COMPLETE").write_text(f"{seal}\n")
    return checkpoint


def test_the_export_of_another_checkpoint_is_replaced_and_verified_again(tmp_path, monkeypatch):
    published = Published(monkeypatch, ok=True)
    for seal, calls in (("a", 3), ("a", 1), ("b", 3), ("b", 1)):
        published.calls.clear()
        ledger = Ledger.open(tmp_path / "schedule.json", [])
        assert chain._publish(tmp_path, sealed_checkpoint(tmp_path, seal), ledger) == ExitCode.OK
        assert published.calls == ["export", "verify", "report"][-calls:]
        assert ledger.exported == {"checkpoint": "second/checkpoints/step_00000004", "integrity": seal}


@pytest.mark.parametrize("left", [["second"], ["hf"], ["second", "hf"]])
def test_what_was_made_from_a_removed_stage_is_refused(recipe, tmp_path, monkeypatch, left):
    monkeypatch.setattr(chain, "prepare_parts", None)
    run = tmp_path / "runs" / "chain"
    for name in left:
        (run / name).mkdir(parents=True)
        (run / name / "config.yaml").touch()
    with pytest.raises(ConfigError) as error:
        chain.run(compose(recipe, tmp_path / "runs"))
    text = str(error.value)
    assert f"{run / 'first'} is missing" in text
    assert f"remove {', '.join(str(run / name) for name in left)} too, or choose another run.name" in text


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from small_schedule import compose
from nemovl_train.schedule import chain
from nemovl_train.convert import checkpoints, verify
verify.verify = lambda out, reference: {"ok": True}
sys.exit(chain.run(compose(Path(sys.argv[1]), Path(sys.argv[2]))))
"""


@pytest.mark.slow
def test_two_processes_write_everything_once(finished, data, parts, tmp_path):
    """Under a launcher: parts and export come from one process, the stages from both; nothing hangs."""
    recipe = write_recipes(tmp_path / "recipes", data, parts, export=True)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(recipe), str(tmp_path / "runs"), *paths],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "chain"
    assert [stage["state"] for stage in ledger(run)] == ["done", "done"]
    assert (run / "hf" / "config.json").is_file()
    assert (run / "report.html").is_file()
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    for stage in ("first", "second"):
        steps = [json.loads(line)["step"] for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4]
    alone, both = (tensors(r / "second" / "checkpoints" / "step_00000004") for r in (finished[1], run))
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
