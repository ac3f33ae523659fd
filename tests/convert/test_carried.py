"""Documents and Python files of an imported folder: carried to the export, byte for byte, and never run."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemovl_train.checkpoint.files import sha256
from nemovl_train.config.schema import RunConfig, RunSection, TrainerConfig
from nemovl_train.convert.carried import FOLDER as CARRIED
from nemovl_train.convert.carried import carry, merge
from nemovl_train.convert.checkpoints import checkpoint_tensors, export_checkpoint, import_checkpoint
from nemovl_train.convert.hf_export import MANIFEST
from nemovl_train.convert.tensor_files import SINGLE, read_json


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def foreign(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A VLM folder as its author would publish it: own code, own fields, A_log in bf16 beside a float32 dt_bias."""
    folder = shutil.copytree(folders["vlm"], tmp_path / "foreign")
    (folder / MANIFEST).unlink()
    shutil.rmtree(folder / "transformers_omni")
    sentinel = tmp_path / "was_run"
    for name in ("modeling", "configuration"):
        (folder / f"{name}.py").write_bytes(f"open({str(sentinel)!r}, 'w').close()\r\n# \xe9\n".encode("latin-1"))
    document = read_json(folder / "config.json")
    document |= {"auto_map": {"AutoModel": "modeling.Model"}, "template": "chat", "torch_dtype": "bfloat16"}
    document["llm_config"] |= {"our_engine_wants": 3, "torch_dtype": "bfloat16"}
    document["vision_config"] |= {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [12], "bos_token_id": 1, "top_p": 0.9}))
    wide = ("dt_bias", "norm_mean", "norm_std")
    tensors = {n: t if n.endswith(wide) else t.bfloat16() for n, t in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def same_tensors(first: Path, second: Path) -> None:
    left, right = load_file(first / SINGLE), load_file(second / SINGLE)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert right[name].dtype == tensor.dtype, name
        assert torch.equal(right[name], tensor), name


def test_round_trip_keeps_code_fields_and_every_format(foreign: Path, tmp_path: Path) -> None:
    import_checkpoint(foreign, tmp_path / "ours")
    out = export_checkpoint(tmp_path / "ours", tmp_path / "out")
    same_tensors(foreign, out)
    for name in ("modeling.py", "configuration.py"):
        assert (out / name).read_bytes() == (foreign / name).read_bytes()
        assert read_json(out / MANIFEST)["files"][name] == sha256(foreign / name)
        assert sha256(foreign / name) in (out / "README.md").read_text()
    assert read_json(out / "config.json") == read_json(foreign / "config.json")
    assert read_json(out / "generation_config.json")["top_p"] == 0.9
    assert (out / "transformers_omni" / "config.json").is_file()
    assert "trust_remote_code" in (out / "README.md").read_text()
    assert not (tmp_path / "was_run").exists()
    assert not any(str(tmp_path) in str(getattr(m, "__file__", "")) for m in list(sys.modules.values()))


def test_a_wide_dt_bias_loads_into_a_narrow_model(foreign: Path, tmp_path: Path) -> None:
    from nemovl_train.checkpoint import sealed
    from nemovl_train.convert.checkpoints import single_process_model

    checkpoint = import_checkpoint(foreign, tmp_path / "ours")
    info, tensors = checkpoint_tensors(checkpoint)
    name = "language_model.decoder.layers.0.mixer.dt_bias"
    assert tensors.specs[name].dtype == torch.float32
    with single_process_model(info.config, torch.bfloat16) as model:
        sealed.load(checkpoint, model=model)
        held = dict(model.named_parameters())
        assert torch.equal(held[name].detach(), tensors.read(name).bfloat16())
        assert torch.equal(
            held[name.replace("dt_bias", "A_log")].detach(), tensors.read(name.replace("dt_bias", "A_log"))
        )


def test_what_training_changed_wins(foreign: Path, tmp_path: Path) -> None:
    """A stage that started from the import, with another context length: its export has both."""
    from nemovl_train.checkpoint.streamed import save_streamed
    from nemovl_train.config.dump import dump_yaml
    from nemovl_train.convert.stored import to_stored

    parent = import_checkpoint(foreign, tmp_path / "ours")
    info, tensors = checkpoint_tensors(parent)
    model = replace(info.config, language=replace(info.config.language, max_position=4096))
    run = RunConfig(model=model, run=RunSection(stage="sft"), trainer=TrainerConfig(init_from=str(parent)))
    stored = to_stored(tensors, model.language)
    stage = tmp_path / "run" / "sft"
    (stage / "checkpoints").mkdir(parents=True)
    (stage / "config.yaml").write_text(dump_yaml(run))
    save_streamed(
        stage / "checkpoints",
        5,
        specs={n: s.meta() for n, s in stored.specs.items()},
        read=stored.read,
        state={"parent": str(parent), "step": 5},
        run_id="run/sft",
    )
    scores = {"loss": 1.23456, "exact_match": 0.5, "samples": 4}
    (stage / "evaluation.json").write_text(json.dumps({"step": 5, "sources": {"digits": scores}}))
    out = export_checkpoint(stage, tmp_path / "out", tokenizer=tmp_path / "ours" / "tokenizer")
    assert '{"digits": {"exact_match": 0.5, "loss": 1.2346}}' in (out / "README.md").read_text()
    document = read_json(out / "config.json")
    assert document["llm_config"]["max_position_embeddings"] == 4096
    assert (document["template"], document["llm_config"]["our_engine_wants"]) == ("chat", 3)
    assert (out / "modeling.py").read_bytes() == (foreign / "modeling.py").read_bytes()
    shutil.rmtree(parent.parent.parent)
    (stage / "evaluation.json").write_text(json.dumps({"step": 4, "sources": {"digits": scores}}))
    again = export_checkpoint(stage, tmp_path / "again", tokenizer=foreign)
    assert "digits" not in (again / "README.md").read_text()  # of another step
    assert not (again / "modeling.py").exists()


def test_merge_takes_the_side_that_changed() -> None:
    imported = {"a": 1, "own": {"x": 1}, "sub": {"k": 1, "mine": 2}, "n": None}
    then = {"a": 9, "sub": {"k": 1}, "n": 4, "new": 1}
    assert merge(imported, then, then) == {"a": 1, "sub": {"k": 1, "mine": 2}, "n": None, "new": 1, "own": {"x": 1}}
    now = then | {"a": 8, "sub": {"k": 7}}
    assert merge(imported, then, now)["a"] == 8
    assert merge(imported, then, now)["sub"] == {"k": 7, "mine": 2}
    old = {"text_config": {"k": 1, "mine": 2}}
    assert merge(old, {"llm_config": {"k": 1}}, {"llm_config": {"k": 3}}) == {"text_config": {"k": 3, "mine": 2}}


def test_a_link_out_of_the_folder_stays_behind(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere" / "secret.py"
    secret.parent.mkdir()
    secret.write_text("key")
    folder = tmp_path / "repo" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "bad.py").symlink_to(secret)
    blobs = tmp_path / "repo" / "blobs"
    blobs.mkdir()
    (blobs / "0123").write_text("code")
    (folder / "good.py").symlink_to("../../blobs/0123")
    carry(folder, tmp_path / CARRIED)
    assert [p.name for p in (tmp_path / CARRIED).iterdir()] == ["good.py"]
    assert not (tmp_path / CARRIED / "good.py").is_symlink()
