"""The page as a whole: complete, self-contained, safe, and there whatever is missing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from page import Page
from synthetic_run import HOSTILE, STAGES, write_json

from nemovl_train.exceptions import UserError
from nemovl_train.report.html import write_report


def read(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Page:
    return read(finished_run)


def test_shows_every_section(page: Page) -> None:
    assert "5 of 5 stages done" in page.words
    assert len(page.all("article", "chip")) == len(STAGES)
    assert len(page.all("figure", "chart")) == 7  # loss twice, learning rate, gradient norm, throughput, fill, parts
    assert "87.0%" in page.words
    assert "digits_read" in page.words
    assert "stage4_long_context_300k/checkpoints" not in page.words  # nothing starts from the last stage
    assert "stage3_code_recovery_49k/checkpoints/step_00000110" in page.words
    assert "text + two tiles" in page.words
    assert "2.4e-05" in page.words
    assert "options differ from stage0_projector_warmup" in page.words
    assert "2.11.0" in page.words


def test_best_cell_of_each_row_is_marked(page: Page) -> None:
    assert len(page.all("td", "best")) == 5


def test_nothing_is_fetched(page: Page) -> None:
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("iframe")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert "url(" not in attributes.get("style", "")
    assert not re.search(r"url\(|@import", page.source)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_text_of_others_is_escaped(page: Page) -> None:
    assert HOSTILE in page.words
    assert "<script" not in page.source
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_a_picture_is_embedded_once_and_enlarged_by_a_whole_factor(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) == 4 + 6  # four digits and six frames, not once per stage
    assert all(p["src"].startswith("data:image/png;base64,") and "tiny" in p["class"] for p in pictures)
    assert pictures[0]["width"] == str(32 * 6)


def test_long_questions_keep_their_end(page: Page) -> None:
    assert "What colour is the door of house 12?" in page.words
    assert "whole question" in page.words


@pytest.mark.parametrize("name", ["schedule.json", "environment.json", "hf", "parts"])
def test_missing_at_run_level(run_folder: Path, name: str) -> None:
    path = run_folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "5 of 5 stages done" in read(run_folder).words


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "evaluation.json", "predictions.json", "predictions", "config.yaml"]
)
def test_missing_in_every_stage(run_folder: Path, name: str) -> None:
    for stage, *_ in STAGES:
        path = run_folder / stage / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = read(run_folder).words
    expected = "could not be read" if name == "predictions" else f"STAGE/{name}"
    assert expected in words


def test_empty_folder(tmp_path: Path) -> None:
    page = read(tmp_path)
    assert "No stage has left a trace" in page.words
    assert "No steps yet" in page.words


def test_unreadable_files_are_named(run_folder: Path) -> None:
    stage = run_folder / STAGES[1][0]
    (run_folder / "environment.json").write_text('{"python": ')
    (stage / "evaluation.json").write_text("[1, 2]")
    (stage / "config.yaml").write_text("a: [1\nb: {")
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    (stage / "metrics.jsonl").write_text("\n".join([*lines[:5], "not json", *lines[5:]]) + "\n")
    words = read(run_folder).words
    assert "environment.json: " in words
    assert "evaluation.json: holds a list, expected a dict" in words
    assert "config.yaml: " in words
    assert "1 lines are not JSON objects, the first is line 6" in words


def test_a_run_that_goes_on(run_folder: Path) -> None:
    schedule = json.loads((run_folder / "schedule.json").read_text())
    for entry, state in zip(schedule["stages"], ["done", "done", "running", "pending", "pending"], strict=True):
        entry["state"] = state
        if state == "pending":
            shutil.rmtree(run_folder / entry["name"])
    write_json(run_folder / "schedule.json", schedule)
    metrics = run_folder / STAGES[2][0] / "metrics.jsonl"
    rows = metrics.read_text().splitlines()[:60]
    broken = json.loads(rows[20]) | {"loss": float("nan"), "grad_norm": None, "applied": False}
    rows[20] = json.dumps(broken)
    metrics.write_text("\n".join(rows) + '\n{"step": 61, "lo')
    page = read(run_folder)
    assert "2 of 5 stages done" in page.words
    assert "60 of 140" in page.words
    assert "time left" in page.words
    assert "skipped 1 step" in page.words
    assert len(page.all("path", "mark")) == 3  # both loss charts and the gradient norm
    assert "could not be read" not in page.words  # the half-written line is the run's next step, not a fault


@pytest.mark.parametrize("value", [float("nan"), None, "text", float("inf")])
def test_a_column_without_numbers(run_folder: Path, value: object) -> None:
    for stage, *_ in STAGES:
        path = run_folder / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"loss": value, "tokens": value}) + "\n" for row in rows[:30]))
    assert "5 of 5 stages done" in read(run_folder).words


def test_single_run_and_a_stage_alone(run_folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    shutil.copytree(run_folder / STAGES[1][0], single / "train")
    assert "1 of 1 stage done" in read(single).words
    assert "1 of 1 stage done" in read(single / "train").words


def test_schedule_cannot_name_a_folder_elsewhere(run_folder: Path) -> None:
    stages = [{"name": "../../etc", "state": "done"}, {"name": STAGES[0][0], "state": "done"}, "text", {}]
    write_json(run_folder / "schedule.json", {"format_version": 1, "stages": stages})
    assert len(read(run_folder).all("article", "chip")) == 1


def test_images_outside_the_stage_are_not_read(run_folder: Path) -> None:
    stage = run_folder / STAGES[0][0]
    rows = json.loads((stage / "predictions.json").read_text())
    outside = "../stage1_sft_16k/predictions/digit_0.png"
    row = rows[0] | {"key": "outside", "images": [outside, "predictions"]}
    for name, *_ in STAGES:
        write_json(run_folder / name / "predictions.json", [row])
    page = read(run_folder)
    assert not page.all("img")
    assert "2 images could not be read" in page.words


def test_odd_but_valid_json(run_folder: Path) -> None:
    stage = run_folder / STAGES[0][0]
    write_json(stage / "evaluation.json", {"sources": {"<b>": {"loss": None}, "b": 3, "c": {"exact_match": 7}}})
    write_json(stage / "predictions.json", [{}, 3, {"source": None, "images": "x", "correct": None}])
    write_json(run_folder / "hf" / "verification.json", {"a": [], "b": {}, "c": [{"x": 1}, {"y": None}], "d": [[1], 2]})
    (stage / "events.jsonl").write_text('{"time": "soon", "event": "start"}\n{"time": 1e99, "event": "end"}\n[]\n')
    page = read(run_folder)
    assert "<b>" in page.words
    assert not page.all("b", "x")


def test_replaced_in_one_move_and_written_elsewhere(run_folder: Path, tmp_path: Path) -> None:
    first = write_report(run_folder)
    assert first == run_folder / "report.html"
    assert write_report(run_folder, tmp_path / "out.html") == tmp_path / "out.html"
    assert not list(run_folder.glob("*.tmp"))


def test_errors_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nemovl report runs/NAME"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path, tmp_path / "no folder" / "report.html")


def test_heldout_loss_and_exported_models_are_shown_where_there_are_some(page: Page, finished_run, tmp_path) -> None:
    assert "Held-out loss while training" not in page.words
    assert "Exported model" not in page.words
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    rows = [{"step": 10 * (i + 1), "loss": 3.0 - i, "best_step": 10 * (i + 1)} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 40, "loss": None}])
    (run / STAGES[1][0] / "validation.jsonl").write_text(lines)
    groups = {HOSTILE: {"samples": 3, "anls": 0.5, "other": "x"}, "broken": 7}
    found = {"samples": 12, "left_out": 2, "metrics": {"anls": 0.25, "none": None}, "groups": groups, "loss": 1.5}
    write_json(
        run / "evaluations/final.json", {"model": HOSTILE, "sources": {"docvqa": found, "odd": 3}, "think": True}
    )
    write_json(run / "evaluations/odd.json", {"sources": [1]})
    (run / "evaluations/cut.json").write_text("{")
    shown = read(run)
    assert len(shown.all("figure", "chart")) == len(page.all("figure", "chart")) + 1
    assert "Held-out loss while training" in shown.words
    for text in ("Exported model", "final", "docvqa", "25.0%", "50.0%", "left out", f"docvqa: {HOSTILE}"):
        assert text in shown.words
    assert "evaluations/cut.json" in shown.words
