"""Folders on disk: deterministic and atomic export, strict and harmless import, configs both ways."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemovl_train.checkpoint.files import sha256
from nemovl_train.convert import hf_export
from nemovl_train.convert.hf_config import read_config
from nemovl_train.convert.hf_export import MANIFEST, export_canonical
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.tensor_files import INDEX, SINGLE
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors

KINDS = ("vlm", "language", "vision")


def weights(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in folder.glob("*.safetensors*")}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A VLM folder to damage, without the hashes that would give every damage away."""
    target = tmp_path / "copy"
    shutil.copytree(folders["vlm"], target)
    (target / MANIFEST).unlink()
    return target


def rewrite(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("kind", KINDS)
def test_export_import_export_is_bitwise(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = HFFolder(folders[kind])
    tensors = dict(folder.tensors())
    assert all(torch.equal(tensors[n], t) for n, t in random_tensors(kind=kind).items())
    again = export_canonical(
        reversed(tensors.items()),
        folder.config,
        tmp_path / kind,
        kind=kind,
        tokenizer=None,
        card={},
        constants=folder.constants(),
    )
    assert weights(again) == weights(folders[kind])
    assert (again / "config.json").read_bytes() == (folders[kind] / "config.json").read_bytes()


def test_read_config_is_the_inverse_of_write_config(folders: dict[str, Path]) -> None:
    assert read_config(folders["vlm"]) == CONFIG
    language = read_config(folders["language"])
    assert language.parts == ("language",)
    # A text model has no media tags yet: all its rows are base rows, and the tags will follow them.
    assert language.language == replace(CONFIG.language, base_vocab_size=112)
    assert (language.tokens.image, language.tokens.video, language.tokens.eos) == (112, 121, 12)
    vision = read_config(folders["vision"])
    assert (vision.parts, vision.vision) == (("vision",), CONFIG.vision)


def test_config_has_the_fields_that_engines_read(folders: dict[str, Path]) -> None:
    document = json.loads((folders["vlm"] / "config.json").read_text())
    assert document["architectures"] == ["NemotronH_Nano_VL_V2"]
    assert document["model_type"] == "NemotronH_Nano_VL_V2"
    assert document["llm_config"]["hybrid_override_pattern"] == "M-M*-M-"
    assert document["llm_config"]["architectures"] == ["NemotronHForCausalLM"]
    args = document["vision_config"]["args"]
    summary = len({t["name"] for t in args["teachers"]})
    # NVlabs/RADIO: registers fill the summary tokens up to the next multiple.
    assert summary + args["register_multiple"] - summary % args["register_multiple"] == CONFIG.vision.prefix_tokens
    assert document["img_context_token_id"] == 96
    assert document["video_context_token_id"] == 105
    assert json.loads((folders["vlm"] / "preprocessor_config.json").read_text())["max_num_tiles"] == 12
    assert json.loads((folders["vlm"] / "generation_config.json").read_text())["eos_token_id"] == [12]
    assert (folders["vlm"] / "tokenizer.json").is_file()
    assert (folders["vlm"] / "chat_template.jinja").is_file()


def test_hub_tower_without_sizes(folders: dict[str, Path], tmp_path: Path) -> None:
    """The published tower's config names a timm model instead of sizes, and its pixel statistics are tensors."""
    shutil.copytree(folders["vision"], tmp_path / "tower")
    document = {
        "architectures": ["RADIOModel"],
        "args": {"model": "vit_huge_patch16_224"},
        "preferred_resolution": [64, 64],
    }
    (tmp_path / "tower" / "config.json").write_text(json.dumps(document))
    vision = read_config(tmp_path / "tower").vision
    assert vision.num_attention_heads == 16
    assert vision.norm_mean == pytest.approx(CONFIG.vision.norm_mean, rel=1e-6)
    assert (
        replace(vision, num_attention_heads=3, norm_mean=CONFIG.vision.norm_mean, norm_std=CONFIG.vision.norm_std)
        == CONFIG.vision
    )


def test_shards_and_index(tmp_path: Path, folders: dict[str, Path]) -> None:
    out = export_canonical(
        random_tensors().items(), CONFIG, tmp_path / "s", kind="vlm", tokenizer=None, card={}, max_shard_bytes=60_000
    )
    index = json.loads((out / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert all((out / f).is_file() for f in files)
    assert not (out / SINGLE).exists()
    whole = load_file(folders["vlm"] / SINGLE)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    parts = {n: t for f in files for n, t in load_file(out / f).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[n], t) for n, t in whole.items())
    assert all(torch.equal(t, random_tensors()[n]) for n, t in HFFolder(out).tensors())


def test_bf16_export_keeps_states_in_float32(tmp_path: Path) -> None:
    out = export_canonical(
        random_tensors().items(), CONFIG, tmp_path / "b", kind="vlm", tokenizer=None, card={}, dtype=torch.bfloat16
    )
    folder = HFFolder(out)
    assert (folder.dtype, folder.state_dtype) == (torch.bfloat16, torch.float32)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors.pop("projector.norm.weight")
    with pytest.raises(ConversionError, match=r"missing projector\.norm\.weight"):
        export_canonical(tensors.items(), CONFIG, tmp_path / "x", kind="vlm", tokenizer=None, card={})
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(**options) -> Path:
        tensors = random_tensors(kind="vision").items()
        return export_canonical(tensors, CONFIG, tmp_path / "x", kind="vision", tokenizer=None, card={}, **options)

    before = weights(export())
    with pytest.raises(ConversionError, match="exists"):
        export()
    with monkeypatch.context() as patch:
        patch.setattr(hf_export, "_publish", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export(overwrite=True)
    assert weights(tmp_path / "x") == before
    export(overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    (tmp_path / "x" / MANIFEST).unlink()
    with pytest.raises(ConversionError, match="no export made it"):
        export(overwrite=True)


def test_swapped_tensors_of_one_shape_are_caught_by_hash(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["vlm"], tmp_path / "x")
    path = tmp_path / "x" / SINGLE
    tensors = load_file(path)
    a, b = (f"language_model.backbone.layers.3.mixer.{c}_proj.weight" for c in "kv")
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers\.3\.mixer\.[kv]_proj\.weight is not the one that was exported"):
        dict(HFFolder(tmp_path / "x").tensors())


def test_pickles_and_code_of_a_stranger_are_never_run(folders: dict[str, Path], copy: Path) -> None:
    sentinel = copy / "was_run"
    code = f"open({str(sentinel)!r}, 'w').close()\n"
    for name in ("modeling", "configuration", "processing"):
        (copy / f"{name}.py").write_text(code)
    classes = {k: f"modeling.{k}" for k in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor")}
    rewrite(copy, auto_map=classes)
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(sentinel).encode() + b"'\ntR.")
    folder = HFFolder(copy)
    assert folder.config == CONFIG
    assert len(dict(folder.tensors())) == len(random_tensors())
    (copy / SINGLE).unlink()
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin, a pickle"):
        HFFolder(copy)
    assert not sentinel.exists()
    assert not any(str(copy) in str(getattr(m, "__file__", "")) for m in list(sys.modules.values()))


def test_index_cannot_point_outside(copy: Path) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(ConversionError, match=r"secret\.safetensors"):
        HFFolder(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": {"x": SINGLE}}))
    with pytest.raises(ConversionError, match="disagree"):
        HFFolder(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    data = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match="cannot be read as safetensors"):
        HFFolder(copy)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*known are NemotronH_Nano_VL_V2"),
        ({"architectures": None}, "none of which"),
        ({"ps_version": "v1"}, "ps_version is 'v1', supported is 'v2'"),
        ({"llm_config": None}, "llm_config or text_config is missing"),
        ({"img_context_token_id": None}, "img_context_token_id is missing"),
    ],
)
def test_config_problems_are_named(copy: Path, fields: dict, words: str) -> None:
    rewrite(copy, **fields)
    with pytest.raises(ConversionError, match=words):
        read_config(copy)


def test_unsupported_layers_and_settings_are_named(copy: Path) -> None:
    llm = json.loads((copy / "config.json").read_text())["llm_config"]
    rewrite(copy, llm_config=llm | {"hybrid_override_pattern": "ME*-M-M"})
    with pytest.raises(ConversionError, match="ME"):
        read_config(copy)
    rewrite(copy, llm_config=llm | {"tie_word_embeddings": True, "mlp_hidden_act": "silu"})
    with pytest.raises(ConversionError, match=r"(?s)tie_word_embeddings.*mlp_hidden_act"):
        read_config(copy)


def test_model_card_says_what_opens_the_folder(folders: dict[str, Path]) -> None:
    text = (folders["vlm"] / "README.md").read_text()
    assert "**recipe**: test" in text
    assert "transformers_omni" in text
    assert sha256(folders["vlm"] / SINGLE) in text
