"""An exported folder against the loading rules that vLLM publishes, written here as a table of their own.

Sources: vLLM `model_executor/models/{nano_nemotron_vl,nemotron_h,radio}.py`. What vLLM drops without a word (unknown
names of the tower) counts as an error here: every tensor must fill a parameter, or be one that its loader skips.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.tensor_files import SINGLE, read_json

from .tiny import CONFIG, random_tensors

SKIPPED = re.compile(r"vision_model\.radio_model\.(input_conditioner\.|summary_idxs)")
# nemotron_h.py: hf_to_vllm_mapper (prefix, then substrings), and the stacked q, k, v.
LANGUAGE_RENAMES = [(r"^backbone", "model"), (r"A_log", "A"), (r"embeddings", "embed_tokens")]
STACKED = re.compile(r"\.([qkv])_proj\.")
# radio.py: names below `radio_model.`; the qkv of a block stays one matrix.
TOWER_RENAMES = [(r"^model\.patch_generator\.", "patch_generator."), (r"^model\.blocks\.", "encoder.layers.")]
# Modules that are some kind of vLLM's LinearBase; a convolution of Mamba is one, the head is none.
LINEAR_MODULES = re.compile(r"_proj$|conv1d$|attn\.(qkv|proj)$|mlp\.fc[12]$|mlp1\.[13]$")


def route(name: str) -> tuple[str, str, str]:
    """(module of vLLM, parameter, q/k/v piece or nothing) that a tensor of the folder loads into."""
    piece = ""
    if name.startswith("language_model."):
        module, rest = "language_model", name.removeprefix("language_model.")
        for pattern, replacement in LANGUAGE_RENAMES:
            rest = re.sub(pattern, replacement, rest)
        found = STACKED.search(rest)
        if found:
            piece, rest = found[1], STACKED.sub(".qkv_proj.", rest)
    elif name.startswith("mlp1."):
        module, rest = "mlp1", name.removeprefix("mlp1.")
    elif name.startswith("vision_model.radio_model."):
        module, rest = "vision_model", name.removeprefix("vision_model.radio_model.")
        for pattern, replacement in TOWER_RENAMES:
            rest = re.sub(pattern, replacement, rest)
    else:
        raise AssertionError(f"vLLM routes by prefix and drops {name}")
    return module, rest, piece


def parameters(folder: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """Parameters that vLLM builds from config.json, by its fields alone."""
    document = read_json(folder / "config.json")
    llm, vision = document["llm_config"], document["vision_config"]
    hidden, inner = llm["hidden_size"], llm["mamba_num_heads"] * llm["mamba_head_dim"]
    conv = inner + 2 * llm["n_groups"] * llm["ssm_state_size"]
    out: dict[tuple[str, str], tuple[int, ...]] = {
        ("language_model", "model.embed_tokens.weight"): (llm["vocab_size"], hidden),
        ("language_model", "lm_head.weight"): (llm["vocab_size"], hidden),
        ("language_model", "model.norm_f.weight"): (hidden,),
    }
    heads, groups = llm["num_attention_heads"], llm["num_key_value_heads"]
    kinds = {
        "M": {
            "in_proj.weight": (inner + conv + llm["mamba_num_heads"], hidden),
            "conv1d.weight": (conv, 1, llm["conv_kernel"]),
            "conv1d.bias": (conv,),
            **dict.fromkeys(("A", "D", "dt_bias"), (llm["mamba_num_heads"],)),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        },
        "-": {
            "up_proj.weight": (llm["intermediate_size"], hidden),
            "down_proj.weight": (hidden, llm["intermediate_size"]),
        },
        "*": {
            "qkv_proj.weight": ((heads + 2 * groups) * llm["head_dim"], hidden),
            "o_proj.weight": (hidden, heads * llm["head_dim"]),
        },
    }
    for n, kind in enumerate(llm["hybrid_override_pattern"]):
        out["language_model", f"model.layers.{n}.norm.weight"] = (hidden,)
        for leaf, shape in kinds[kind].items():
            out["language_model", f"model.layers.{n}.mixer.{leaf}"] = shape
    width, patch = document["vit_hidden_size"], document["patch_size"]
    joined = width * int(1 / document["downsample_ratio"]) ** 2
    out |= {
        ("mlp1", "0.weight"): (joined,),
        ("mlp1", "1.weight"): (document["projector_hidden_size"], joined),
        ("mlp1", "3.weight"): (hidden, document["projector_hidden_size"]),
    }
    args = vision["args"]
    summary = len({t["name"] for t in args["teachers"]}) if args["cls_token_per_teacher"] else 1
    multiple = args["register_multiple"]
    prefix = summary + (multiple - summary % multiple if multiple else 0)
    block = {
        **{f"norm{i}.{leaf}": (width,) for i in (1, 2) for leaf in ("weight", "bias")},
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (int(vision["mlp_ratio"] * width), width),
        "mlp.fc1.bias": (int(vision["mlp_ratio"] * width),),
        "mlp.fc2.weight": (width, int(vision["mlp_ratio"] * width)),
        "mlp.fc2.bias": (width,),
    }
    out |= {
        ("vision_model", "patch_generator.embedder.weight"): (width, 3 * patch**2),
        ("vision_model", "patch_generator.pos_embed"): (1, (args["cpe_max_size"] // patch) ** 2, width),
        ("vision_model", "patch_generator.cls_token.token"): (prefix, width),
    }
    for n in range(vision["num_hidden_layers"]):
        out |= {("vision_model", f"encoder.layers.{n}.{leaf}"): shape for leaf, shape in block.items()}
    return out | scales(document.get("quantization_config"), out)


def scales(
    scheme: dict | None, plain: dict[tuple[str, str], tuple[int, ...]]
) -> dict[tuple[str, str], tuple[int, int]]:
    """What `quantization/compressed_tensors` adds for one scale a row: to every linear module that is not ignored."""
    if scheme is None:
        return {}
    (group,) = scheme["config_groups"].values()
    assert (group["targets"], group["weights"]["strategy"]) == (["Linear"], "channel")
    ignored = [re.compile(text.removeprefix("re:")) for text in scheme["ignore"]]
    out = {}
    for (module, parameter), shape in plain.items():
        name = f"{module}.{parameter.removesuffix('.weight')}"
        if LINEAR_MODULES.search(name) and parameter.endswith(".weight") and not any(p.match(name) for p in ignored):
            out[module, f"{parameter}_scale"] = (shape[0], 1)
    return out


def load(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """What is wrong after loading by these rules; empty when every parameter is filled by every tensor."""
    left, problems = parameters(folder), []
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for name, tensor in tensors.items():
        if SKIPPED.match(name):
            continue
        module, parameter, piece = route(name)
        shape = left.get((module, parameter))
        if shape is None:
            problems.append(f"no parameter for {name}")
        elif piece:
            rows.setdefault((module, parameter), {})[piece] = tensor.shape[0]
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name} is {list(tensor.shape)}, the parameter {list(shape)}")
        else:
            del left[module, parameter]
    for key, pieces in rows.items():
        if set(pieces) == {"q", "k", "v"} and sum(pieces.values()) == left[key][0]:
            del left[key]
    return problems + [f"nothing fills {module}.{parameter}" for module, parameter in left]


@pytest.mark.parametrize("prefix_tokens", [8, 16])
def test_vllm_loads_every_tensor_into_every_parameter(prefix_tokens: int, tmp_path: Path) -> None:
    config = replace(CONFIG, vision=replace(CONFIG.vision, prefix_tokens=prefix_tokens))
    out = export_canonical(random_tensors(config), config, tmp_path / "x", kind="vlm", tokenizer=None, card={})
    assert load(out, load_file(out / SINGLE)) == []


def test_vllm_loads_fp8_weights_with_their_scales(tmp_path: Path) -> None:
    out = export_canonical(random_tensors(), CONFIG, tmp_path / "x", kind="vlm", tokenizer=None, card={}, fp8=True)
    tensors = load_file(out / SINGLE)
    assert load(out, tensors) == []
    assert sum(parameter.endswith("_scale") for _, parameter in parameters(out)) == 3 * 2 + 3 * 2 + 2
    for name in ("k_proj", "o_proj"):
        del tensors[f"language_model.backbone.layers.3.mixer.{name}.weight_scale"]
    assert len(load(out, tensors)) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("language_model.backbone.layers.0.mixer.A_log", "nothing fills language_model.model.layers.0.mixer.A"),
        (
            "language_model.backbone.layers.3.mixer.k_proj.weight",
            "nothing fills language_model.model.layers.3.mixer.qkv",
        ),
        ("vision_model.radio_model.model.blocks.1.attn.qkv.bias", "nothing fills vision_model.encoder.layers.1.attn"),
        ("mlp1.0.weight", "nothing fills mlp1.0.weight"),
    ],
)
def test_the_rules_notice_what_is_dropped_or_renamed(name: str, words: str, folders: dict[str, Path]) -> None:
    tensors = load_file(folders["vlm"] / SINGLE)
    value = tensors.pop(name)
    assert any(words in problem for problem in load(folders["vlm"], tensors))
    tensors[name + "_x"] = value
    assert any("no parameter for" in p or words in p for p in load(folders["vlm"], tensors))


def test_the_released_sizes_fill_every_parameter() -> None:
    """The table of names at the 12B model's sizes, on the meta device, against the same rules."""
    import json
    import tempfile

    from nemovl_train.config.schema import ModelConfig
    from nemovl_train.convert.hf_config import write_config
    from nemovl_train.convert.names import table

    config = ModelConfig()
    tensors = {
        name: torch.empty(shape, device="meta")
        for entry in table(config, "vlm")
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
    }
    with tempfile.TemporaryDirectory() as text:
        write_config(config, Path(text), kind="vlm", dtype="bfloat16")
        assert json.loads((Path(text) / "config.json").read_text())["vision_config"]["args"]["model"] == (
            "vit_huge_patch16_224"
        )
        assert load(Path(text), tensors) == []
