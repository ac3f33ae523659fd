"""What the record of a run says about its checkpoint: what goes into the folder's documents and card beside weights."""

import json
from dataclasses import asdict, replace

import pytest
import tiny_runs

from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.carried import FOLDER as CARRIED
from nemovl_train.convert.checkpoints import export_checkpoint, import_checkpoint
from nemovl_train.convert.described import describe_checkpoint
from nemovl_train.convert.hf_config import PREPROCESSOR, read_media_budget
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_layout import MediaBudget
from nemovl_train.convert.tensor_files import read_json
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors


def recorded(config, root):
    """A checkpoint's folder without tensors, in a stage's folder with its config."""
    folder = root / "stage/checkpoints/step_00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 1, "parent": None}))
    (folder.parent.parent / "config.yaml").write_text(dump_yaml(config))
    return folder


def test_a_run_hands_on_its_video_pruning_and_what_it_kept_in_bf16(tmp_path):
    config = tiny_runs.run_config(tmp_path / "data", tmp_path / "runs", sources=("text",), steps=1)
    plain = describe_checkpoint(recorded(config, tmp_path / "plain"))
    assert plain.export["media"].video_pruning_rate == 0
    assert "video pruning rate" not in plain.facts
    assert "bf16_layers" not in plain.export
    precision = replace(config.precision, fp8="blockwise", bf16_layers=2)
    config = replace(config, data=replace(config.data, video_pruning_rate=0.75), precision=precision)
    info = describe_checkpoint(recorded(config, tmp_path / "other"))
    assert info.export["media"].video_pruning_rate == info.facts["video pruning rate"] == 0.75
    assert info.export["bf16_layers"] == 2


def test_the_pruning_rate_is_in_the_folder_and_comes_back(tmp_path, tokenizer_dir):
    media = MediaBudget(video_pruning_rate=0.75)
    out = export_canonical(
        random_tensors(), CONFIG, tmp_path / "hf", kind="vlm", tokenizer=tokenizer_dir, card={}, media=media
    )
    for name in ("config.json", "transformers_omni/config.json"):
        assert read_json(out / name)["video_pruning_rate"] == 0.75
    assert "video_pruning_rate" not in read_json(out / PREPROCESSOR)
    assert read_media_budget(out) == media
    again = export_checkpoint(import_checkpoint(out, tmp_path / "ours"), tmp_path / "again")
    assert read_json(again / "config.json")["video_pruning_rate"] == 0.75
    document = read_json(out / "config.json")
    (out / "config.json").write_text(json.dumps(document | {"video_pruning_rate": 1.5}))
    with pytest.raises(ConversionError, match=r"config.json: video_pruning_rate is 1.5; at least 0 and below 1"):
        read_media_budget(out)


def test_a_carried_model_of_another_version_is_named(tmp_path):
    """A merged checkpoint has two models in its state: what it holds, and what its base's import had."""
    now = json.loads(json.dumps(asdict(ModelConfig())))
    then = {"model": now | {"of_another_version": 1}, "media": asdict(MediaBudget()), "dtype": "float32"}
    folder = tmp_path / "checkpoints/step_00000000"
    folder.mkdir(parents=True)
    (tmp_path / CARRIED).mkdir()
    (folder / "state.json").write_text(json.dumps({"model": now, "source": "x", "carried": then}))
    with pytest.raises(ConversionError, match=r"(?s)a model of another version.*of_another_version"):
        describe_checkpoint(folder)
