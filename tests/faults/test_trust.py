"""What others write: configs name no code, checkpoints carry none, and a run needs no network."""

import socket
from pathlib import Path

import pytest
import tiny_runs
import yaml

from nemovl_train.config.compose import compose_run
from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import ConfigError
from nemovl_train.exit_codes import ExitCode


@pytest.mark.parametrize(
    "content",
    [
        {"trainer": {"_target_": "os.mkdir", "path": "SENTINEL"}},
        {"trainer": {"init_from": {"_target_": "os.mkdir", "path": "SENTINEL"}}},
        {"run": {"_target_": "os.mkdir", "_args_": ["SENTINEL"]}},
        {"run": {"name": "$(mkdir SENTINEL)"}},
        {"run": {"name": "x\n#SBATCH --wrap='mkdir SENTINEL'"}},
        {"data": {"tokenizer": "${python:'os.mkdir(\"SENTINEL\")'}"}},
    ],
)
def test_a_recipe_that_names_code_is_refused_and_runs_none(tmp_path: Path, content: dict) -> None:
    sentinel = tmp_path / "was_run"
    recipe = tmp_path / "bad.yaml"
    defaults = {"defaults": ["/tiny/stage1_sft_16k", "_self_"]}
    text = yaml.safe_dump({**defaults, **content}, sort_keys=False).replace("SENTINEL", str(sentinel))
    recipe.write_text("# @package _global_\n" + text)
    with pytest.raises(ConfigError):
        compose_run(str(recipe))
    assert not sentinel.exists()


def test_a_config_of_a_run_folder_is_data(tmp_path: Path) -> None:
    from nemovl_train.config.dump import load_yaml

    sentinel, path = tmp_path / "was_run", tmp_path / "config.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir ['{sentinel}']\n")
    with pytest.raises(ConfigError, match="cannot be read as a config"):
        load_yaml(RunConfig, path)
    assert not sentinel.exists()


def test_a_run_opens_no_connection(data, tmp_path, monkeypatch) -> None:
    from nemovl_train.training import trainer

    tried = []

    def refuse(self, address, *args):
        tried.append(address)
        raise OSError("no network")

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = tiny_runs.run_config(data, tmp_path, steps=2)
    assert "***" not in dump_yaml(config)
    assert trainer.run(config) == ExitCode.OK
    assert tried == []


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(data, tmp_path, monkeypatch, caplog) -> None:
    from nemovl_train.training import trainer
    from nemovl_train.training.callbacks.trackers import Tracker

    calls = []

    def fails(numbers, step):
        calls.append(step)
        raise OSError("network is unreachable")

    add = trainer.Trainer._add_callbacks

    def with_tracker(run):
        add(run)
        run.callbacks.append(Tracker("far away", fails, lambda: None))

    monkeypatch.setattr(trainer.Trainer, "_add_callbacks", with_tracker)
    assert trainer.run(tiny_runs.run_config(data, tmp_path, steps=3)) == ExitCode.OK
    assert calls == [1]
    assert caplog.text.count("far away stopped working and is left out from here on: network is unreachable") == 1
