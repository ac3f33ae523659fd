"""Numbers behind the page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemovl_train.report import environment
from nemovl_train.report.collect import read_run
from nemovl_train.report.formats import clip, count, decimal, duration, percent, tick
from nemovl_train.report.summary import summarise_run, summarise_stage
from nemovl_train.report.tables import config_lines, evaluation_rows


def test_formats() -> None:
    assert [count(v) for v in (0, 4864, 12_345, 1_930_000, 2.1e10)] == ["0", "4,864", "12.3 k", "1.93 M", "21.0 B"]
    assert [decimal(v) for v in (0.4123, 5.3149, 128.3, 2.1e-5, 0)] == ["0.412", "5.31", "128", "2.1e-05", "0.00"]
    assert [tick(v) for v in (0, 2e-4, 1e-3, 0.25, 7500, 2e6)] == ["0", "2e-4", "1e-3", "0.25", "7.5k", "2M"]
    assert [duration(v) for v in (42, 492, 11_100, 187_200)] == ["42 s", "8 min 12 s", "3 h 05 min", "2 d 04 h"]
    assert {f(float("nan")) for f in (count, decimal, percent, duration)} == {"-"}
    assert len(clip("word " * 1000, 280)) <= 280


def test_short_names_only_where_they_differ(finished_run: Path, tmp_path: Path) -> None:
    assert [stage.short for stage in read_run(finished_run).stages] == [f"stage{i}" for i in range(5)]
    for name in ("sft_a", "sft_b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    assert [stage.short for stage in read_run(tmp_path).stages] == ["sft_a", "sft_b"]


def test_summaries(finished_run: Path) -> None:
    run = read_run(finished_run)
    summaries = [summarise_stage(stage) for stage in run.stages]
    assert [s.steps for s in summaries] == [160, 420, 140, 110, 40]
    assert all(s.last_loss < s.first_loss and 0.9 < s.fill < 1 for s in summaries)
    assert summaries[0].trained == ("projector",)
    total = summarise_run(run, summaries)
    assert total.state == "done"
    assert total.tokens == sum(s.tokens for s in summaries)
    assert total.wall_seconds > total.train_seconds > 0


def test_evaluation_table_puts_exact_match_first_and_marks_ties_of_nothing(finished_run: Path) -> None:
    rows = evaluation_rows(read_run(finished_run).stages)
    assert [row.exact for row in rows] == [True] * 4 + [False]
    assert [cell.best for cell in rows[0].cells] == [False, False, True, False, False]
    assert [cell.best for cell in rows[-1].cells] == [False] * 4 + [True]  # the lowest loss
    assert not any(cell.best for cell in evaluation_rows(read_run(finished_run).stages[:1])[0].cells)


def test_config_differences() -> None:
    old = {"optim": {"lr": 1e-3, "beta": 0.9}, "gone": [1], "same": {"x": None}}
    new = {"optim": {"lr": 3e-4, "beta": 0.9, "eps": 1e-8}, "same": {"x": None}}
    lines = {line.key: line for line in config_lines(new, old)}
    assert (lines["lr"].change, lines["lr"].old, lines["lr"].value) == ("changed", "0.001", "0.0003")
    assert lines["eps"].change == "added"
    assert lines["gone"].change == "removed"
    assert not lines["beta"].change
    assert not lines["x"].change
    assert lines["x"].depth == 1
    assert not any(line.change for line in config_lines(new, None))


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "logging.api_key=abc123"
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/nemovl", "train", "recipe=tiny/stage1", secret])
    found = json.loads(environment.write_environment(tmp_path).read_text())
    assert {"python", "platform", "cpu_count", "device", "command", "git", "date"} <= set(found)
    assert found["command"].startswith("nemovl train recipe=tiny/stage1")
    assert "abc123" not in found["command"]
    assert not list(tmp_path.glob("*.tmp"))


def test_needs_no_torch() -> None:
    code = "import sys, nemovl_train.report.html, nemovl_train.report.environment as e; e.collect_environment()"
    code += "; sys.exit(bool({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
