"""Configs on paper: redacted, read back, hashed, compared."""

import pytest

from nemovl_train.config.compose import compose_run, compose_schedule
from nemovl_train.config.dump import REDACTED, config_diff, config_hash, dump_yaml, load_yaml, redact
from nemovl_train.config.schema import RunConfig, ScheduleConfig
from nemovl_train.exceptions import ConfigError

STAGE = "tiny/stage1_sft_16k"


def test_dump_reads_back_equal(tmp_path):
    path = tmp_path / "config.yaml"
    for cls, config in ((RunConfig, compose_run(STAGE)), (ScheduleConfig, compose_schedule("tiny/schedule"))):
        path.write_text(dump_yaml(config))
        assert load_yaml(cls, path) == config


def test_a_damaged_dump_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        load_yaml(RunConfig, path)
    path.write_text("optim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr\?"):
        load_yaml(RunConfig, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_key", "x"),
        ("wandb_token", "x"),
        ("password", "x"),
        ("path", "hf_abcdefghijkl"),
        ("path", "s3://u:p@host/x"),
    ],
)
def test_secrets_are_redacted(key: str, value: str):
    shown = redact({"section": {key: value}})["section"][key]
    assert REDACTED in shown
    assert value not in shown


def test_ordinary_values_are_not_redacted():
    values = {"tokenizer": "data/tokenizer", "tokens": {"image": 1, "eos": 2}, "key": "a", "seq_length": 3}
    assert redact(values) == values


def test_secret_in_a_path_does_not_reach_the_dump():
    config = compose_run(STAGE, values={"data.tokenizer": "https://user:hunter2@host/x"})
    assert "hunter2" not in dump_yaml(config)


def test_hash_and_diff_see_what_decides_the_result():
    a = compose_run(STAGE)
    harmless = compose_run(STAGE, ["logging.every_steps=1", "parallel.tp=2", "checkpoint.keep_last=9"])
    other = compose_run(STAGE, ["optim.lr=5e-4", "+data.sources.extra.path=x"])
    assert config_hash(a) == config_hash(compose_run(STAGE)) == config_hash(harmless)
    assert config_hash(a, ignore=()) != config_hash(harmless, ignore=())
    assert config_hash(a) != config_hash(other)
    assert config_diff(a, harmless) == []
    # A recipe's data and tokenizer lie under it, so a run cannot move.
    assert "run.root" in [change.key for change in config_diff(a, compose_run(STAGE, values={"run.root": "x"}))]
    changes = {change.key: (change.old, change.new) for change in config_diff(a, other)}
    assert changes["optim.lr"] == (a.optim.lr, 5e-4)
    assert changes["data.sources.extra.weight"] == (None, 1.0)


def test_a_resumed_run_may_find_its_data_elsewhere_and_read_them_otherwise():
    a = compose_run(STAGE)
    name = next(iter(a.data.sources))
    for key, value in ((f"data.sources.{name}.path", "/elsewhere"), ("data.read.timeout_s", 7.0)):
        moved = compose_run(STAGE, values={key: value})
        assert config_hash(a) == config_hash(moved)
        assert config_diff(a, moved) == []
        assert [change.key for change in config_diff(a, moved, ignore=())] == [key]
    for key, value in ((f"data.sources.{name}.split", "other"), ("data.tokenizer", "/elsewhere")):
        other = compose_run(STAGE, values={key: value})
        assert config_hash(a) != config_hash(other)
        assert [change.key for change in config_diff(a, other)] == [key]
