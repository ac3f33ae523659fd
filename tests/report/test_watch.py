"""The live view, from files as runs leave them: whole, half-written, without ranks, by ranks."""

import io
import json
import time

import pytest
from rich.console import Console

from nemovl_train import cli
from nemovl_train.exceptions import UserError
from nemovl_train.report.watch import drawn, look, sparkline, tail

RANKS = {"busy_seconds": [1.0, 1.0, 1.6, 1.0], "data_seconds": [0.1, 0.9, 0.1, 0.1], "memory_bytes": [2.0**33] * 4}


def row(step: int, **more) -> dict:
    loss = 3.0 - step / 100
    times = {"step_seconds": 1.8, "data_seconds": 0.2, "tokens_per_second": 5000.0}
    return {"step": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "applied": True, "fill": 0.98, **times, **more}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "big"
    stage = folder / "second"
    (stage / "checkpoints" / "step_00000080").mkdir(parents=True)
    (stage / "checkpoints" / "step_00000080" / "COMPLETE").write_text("x")
    (stage / "checkpoints" / "step_00000100").mkdir()  # not sealed
    stages = [{"name": "first", "state": "done"}, {"name": "second", "state": "running"}]
    (folder / "schedule.json").write_text(json.dumps({"stages": stages}))
    (stage / "config.yaml").write_text("trainer: {steps: 200}\n")
    rows = [row(step, mfu=0.31, source_loss={"text": 1.25}) for step in range(1, 101)]
    rows[49]["applied"] = False
    rows[89]["ranks"] = RANKS
    rows[0]["source_loss"] = {"pictures": 4.0}
    text = "".join(json.dumps(line) + "\n" for line in rows)
    (stage / "metrics.jsonl").write_text(text + '{"step": 101, "lo')
    events = [
        {"time": 1e9, "event": "start", "step": 0},
        {"time": 1e9, "event": "checkpoint", "step": 80, "folder": "x"},
    ]
    (stage / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def text_of(view) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(drawn(view))
    return console.export_text()


def test_one_moment_of_a_run(run):
    view = look(run)
    assert (view.stage, view.step, view.steps, view.checkpoint) == ("second", 100, 200, "step_00000080")
    assert view.stages == [("first", "done"), ("second", "running")]
    assert view.source_loss == {"text": 1.25, "pictures": 4.0}
    assert view.straggler == (2, 1.6)
    assert view.data_rank == (1, 0.9)
    assert (view.memory_gib, view.mfu, view.skipped) == (8.0, 0.31, 1)
    assert view.data_share == pytest.approx(0.1)
    assert view.seconds_left == pytest.approx(100 * 2.0)
    text = text_of(view)
    for part in ("100/200", "3 min left", "5,000", "MFU 31.0%", "slowest rank 2 1.60 x median", "pictures 4.000"):
        assert part in text, part
    assert "no line for" not in text


def test_a_run_that_says_nothing_is_pointed_out(run):
    metrics = run / "second" / "metrics.jsonl"
    assert "no line for 2.0 h" in text_of(look(run, now=metrics.stat().st_mtime + 7200))


def test_a_stage_folder_old_rows_and_nothing_at_all(run, tmp_path):
    assert look(run / "second").step == 100
    (run / "second" / "metrics.jsonl").write_text("")
    (run / "second" / "config.yaml").write_text(": :")
    view = look(run)
    assert (view.step, view.steps, view.loss, view.straggler) == (0, None, None, None)
    text_of(view)
    with pytest.raises(UserError, match="no run writes here yet"):
        look(tmp_path / "absent")


def test_only_the_end_of_a_file_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in range(200_000)))
    began = time.perf_counter()
    rows = tail(path)
    assert time.perf_counter() - began < 2
    assert rows[-1]["step"] == 199_999
    assert 500 < len(rows) < 5000
    assert [r["step"] for r in rows] == list(range(200_000 - len(rows), 200_000))


def test_bars():
    assert sparkline([1, 2, 3, float("nan")]) == "\u2581\u2585\u2588"
    assert len(sparkline([float(i) for i in range(1000)])) <= 60
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "\u2581\u2581"


def test_the_verb(run, capsys):
    assert cli.main(["watch", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 100
    assert cli.main(["watch", str(run), "--once"]) == 0
    assert "100/200" in capsys.readouterr().out
    assert cli.main(["watch", str(run), "--every", "0"]) == 2
