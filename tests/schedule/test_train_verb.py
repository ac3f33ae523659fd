"""`nemovl train` with a recipe file: the run's environment is recorded once."""

import json

from small_schedule import write_recipes

from nemovl_train.report.environment import record_environment
from nemovl_train.train import train


def test_a_single_stage_records_what_it_ran_on(data, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path, data, parts, steps=1)
    assert train([f"recipe={tmp_path}/second.yaml", "run.root=here", "run.name=single"]) == 0
    run = tmp_path / "here" / "single"
    record = run / "environment.json"
    assert json.loads(record.read_text())["processes"] == 1
    record.write_text("{}")
    assert train([f"recipe={tmp_path}/second.yaml", "run.root=here", "run.name=single"]) == 0
    assert record.read_text() == "{}"


def test_other_processes_and_folders_that_cannot_be_written_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    record_environment(tmp_path / "file" / "run")
    monkeypatch.setenv("RANK", "1")
    record_environment(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
