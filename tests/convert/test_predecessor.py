"""The predecessor's folder (8B V1): Llama's names and rotary embedding, a projector with LayerNorm, GELU and biases."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemovl_train.convert.hf_config import read_config
from nemovl_train.convert.hf_export import MANIFEST, export_canonical
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.names import table
from nemovl_train.convert.ours_check import compute
from nemovl_train.convert.probe import make_probe
from nemovl_train.convert.tensor_files import SINGLE
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors

LLAMA = replace(
    CONFIG,
    name="test-llama",
    language=replace(
        CONFIG.language,
        hybrid_pattern="*-*-",
        activation="swiglu",
        position="rope",
        rope_scaling_factor=8.0,
        rope_theta=10000.0,
        max_position=16384,
        # A text model has none; these are the defaults that a folder's reader leaves.
        **{
            name: getattr(type(CONFIG.language)(), name)
            for name in ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups", "chunk_size")
        },
    ),
    projector=replace(CONFIG.projector, norm="layernorm", activation="gelu", bias=True),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llama") / "hf"
    return export_canonical(random_tensors(LLAMA).items(), LLAMA, out, kind="vlm", tokenizer=None, card={})


def test_names_are_those_of_the_published_folder(llama: Path) -> None:
    """vLLM `nemotron_vl.py` and Transformers' Llama, spelled out."""
    block = [f"self_attn.{c}_proj.weight" for c in "qkvo"] + [f"mlp.{c}_proj.weight" for c in ("gate", "up", "down")]
    block += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    expected = {f"language_model.model.layers.{n}.{leaf}" for n in range(2) for leaf in block}
    expected |= {f"language_model.{n}.weight" for n in ("model.embed_tokens", "model.norm", "lm_head")}
    expected |= {f"mlp1.{n}.{leaf}" for n in (0, 1, 3) for leaf in ("weight", "bias")}
    found = {n for n in load_file(llama / SINGLE) if not n.startswith("vision_model.radio_model.")}
    assert found == expected
    document = json.loads((llama / "config.json").read_text())
    assert document["architectures"] == ["Llama_Nemotron_Nano_VL"]
    assert document["llm_config"]["rope_scaling"]["factor"] == 8.0
    assert not (llama / "transformers_omni").exists()


def test_config_and_tensors_come_back(llama: Path) -> None:
    folder = HFFolder(llama)
    assert folder.config == LLAMA
    assert all(torch.equal(t, random_tensors(LLAMA)[n]) for n, t in folder.tensors())


def test_gate_and_up_are_stacked_in_that_order(llama: Path) -> None:
    hf = load_file(llama / SINGLE)
    fused = random_tensors(LLAMA)["language_model.decoder.layers.3.mlp.linear_fc1.weight"]
    prefix = "language_model.model.layers.1.mlp."
    assert torch.equal(fused, torch.cat([hf[prefix + "gate_proj.weight"], hf[prefix + "up_proj.weight"]]))


def test_every_number_equals_transformers(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and text around two tiles, against LlamaForCausalLM, RadioModel and a composition of both."""
    pytest.importorskip("transformers")
    from nemovl_train.convert.checkpoints import load_tensors, single_process_model
    from nemovl_train.convert.reload_check import main

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # Audit hooks outlive a test, so this run does without; `verify` runs with it, in a process of its own.
    monkeypatch.setattr("nemovl_train.convert.reload_check.refuse_code_from", lambda _: None)
    main(llama, tmp_path)
    theirs = load_file(tmp_path / "theirs.safetensors")
    reports = json.loads((tmp_path / "theirs.json").read_text())["reports"]
    assert reports["language"]["missing_keys"] == reports["language"]["unexpected_keys"] == []
    folder = HFFolder(llama)
    with single_process_model(folder.config, torch.float32) as model, torch.no_grad():
        load_tensors(model, folder.tensors())
        ours = compute(model.eval(), folder.config, make_probe(folder.config))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).abs().max()) <= 1e-4, name


def rewrite(folder: Path, **llm: object) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["llm_config"] |= llm
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None, supported is 1.0"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ],
)
def test_what_cannot_be_expressed_is_named(fields: dict, words: str, llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(llama, tmp_path / "x")
    rewrite(folder, **fields)
    with pytest.raises(ConversionError, match=words):
        read_config(folder)


def test_a_missing_bias_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    folder = shutil.copytree(llama, tmp_path / "x")
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / SINGLE)
    del tensors["mlp1.3.bias"]
    save_file(tensors, folder / SINGLE)
    with pytest.raises(ConversionError, match=r"missing mlp1\.3\.bias"):
        HFFolder(folder)


def test_ids_come_from_the_tokenizer_where_the_config_is_silent(llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(llama, tmp_path / "x")
    document = json.loads((folder / "config.json").read_text())
    for field in ("img_context_token_id", "img_start_token_id", "img_end_token_id", "video_context_token_id"):
        del document[field]
    document["llm_config"]["pad_token_id"] = None
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConversionError, match=r"no tokenizer\.json gives the id of <image>"):
        read_config(folder)
    tags = [{"id": 100 + i, "content": tag} for i, tag in enumerate(("<image>", "<img>", "</img>", "<|eot_id|>"))]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tags}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [12, 103]}))
    tokens = read_config(folder).tokens
    # No <video>: frames stand at the placeholder of images. The turn ends at the tokenizer's own end token.
    assert (tokens.image, tokens.image_start, tokens.image_end, tokens.video) == (100, 101, 102, 100)
    assert (tokens.eos, tokens.pad) == (103, 103)


def test_the_published_sizes_have_the_published_count() -> None:
    """8.03 B of Llama 3.1 with its 128,256 rows."""
    import math

    from nemovl_train.config.compose import compose_run

    config = compose_run("nano_8b_v1_vl/stage1_sft_16k").model
    config = replace(config, language=replace(config.language, vocab_size=128256))
    sizes = {e.ours: math.prod(e.shape) for e in table(config, "vlm")}
    assert sum(n for name, n in sizes.items() if name.startswith("language_model.")) == 8_030_261_248
