"""The model card (README.md) of an exported folder. A pure function of its arguments: no date, no host, no path."""

import json
from collections.abc import Mapping
from typing import Any

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.hf_layout import timm_name
from nemovl_train.convert.names import is_llama

OPENS = {
    "vlm": """\
| engine | opens it | why |
|---|---|---|
| nemovl | yes | `nemovl convert import`, `nemovl generate` |
| Transformers, native classes | yes, with the second config | its Omni class has the same modules |
| vLLM, SGLang | by layout, not run by the export | tensor names and `config.json` are those of the released model |

vLLM and SGLang look the tower's sizes up by `vision_config.args.model` (here `{tower}`), so they refuse a tower of a
size they have no name for. {code} Transformers has no class for `NemotronH_Nano_VL_V2` itself; with its Omni class:

```python
from transformers import AutoConfig, NemotronH_Omni_Reasoning_V3
config = AutoConfig.from_pretrained("FOLDER/transformers_omni")
model = NemotronH_Omni_Reasoning_V3.from_pretrained("FOLDER", config=config)
```

Transformers then reports the video embedder and `summary_idxs` as missing (this architecture has none, and images never
use them) and `input_conditioner.*` as unexpected (pixels are normalised before the tower). Its Mamba layers clamp the
time step at 0.001 from below, which the training code does not: set `mixer.time_step_limit = (0.0, float("inf"))` on
each for equal numbers.""",
    "llama": """\
| engine | opens it | why |
|---|---|---|
| nemovl | yes | `nemovl convert import`, `nemovl generate` |
| Transformers, native classes | in parts | `LlamaForCausalLM` and `RadioModel`; there is no class for the whole |
| vLLM | by layout, not run by the export | it registers `Llama_Nemotron_Nano_VL` with these names and fields |

vLLM builds the tower from the code that `vision_config.auto_map` names. {code}""",
    "language": """\
| engine | opens it | why |
|---|---|---|
| nemovl | yes | `nemovl convert import` |
| Transformers | yes, `NemotronHForCausalLM` | native class with the same tensor names |
| vLLM, SGLang | by layout; not run by the export | they register `NemotronHForCausalLM` with these names |""",
    "llama_language": """\
| engine | opens it | why |
|---|---|---|
| nemovl | yes | `nemovl convert import` |
| Transformers | yes, `LlamaForCausalLM` | native class with the same tensor names |
| vLLM, SGLang | by layout; not run by the export | they register `LlamaForCausalLM` with these names |""",
    "vision": """\
| engine | opens it | why |
|---|---|---|
| nemovl | yes | `nemovl convert import` |
| Transformers | yes, `RadioModel` | native class that reads the tower's published names |""",
}


NO_CODE = (
    "This folder carries no code: an engine that asks for the released folder's Python files needs them added from "
    "there."
)
CODE = (
    "The Python files ({names}) are those of the folder that was imported, byte for byte; nemovl never runs them. With "
    "`trust_remote_code=True` Transformers does: read them first. What they need (timm, mamba-ssm, a GPU) is theirs to "
    "say."
)

FP8 = (
    "Each FP8 weight has one scale a row, `weight_scale`; activations are to be quantised token by token. "
    "`quantization_config` says so in the words of the compressed-tensors package, which vLLM and SGLang have built in "
    "and Transformers needs installed. nemovl reads such weights as their products with the scales. Embedding, head, "
    "norms, convolutions, Mamba's A_log, D and dt_bias, tower and projector are not in FP8. What FP8 does to answers "
    "was not measured."
)


def model_card(
    config: ModelConfig,
    kind: str,
    *,
    parameters: int,
    tensors: int,
    dtype: str,
    files: Mapping[str, str],
    card: Mapping[str, Any],
    plain_ends: int | None = None,
) -> str:
    """Markdown text of the card.

    Args:
        config: Sizes of the model.
        kind: `vlm`, `language` or `vision`.
        parameters: Number of parameters.
        tensors: Number of tensors in the folder.
        dtype: Number format of the weights.
        files: File name -> SHA-256.
        card: What the caller knows: `recipe`, `parent`, `data`, `license`, measured results; any JSON values.
        plain_ends: With the language model's linear layers in FP8, layers at each end that are not; else None.
    """
    number_format = dtype
    if plain_ends is not None:
        number_format += "; linear layers of the language model FP8 (E4M3)"
    if plain_ends:
        number_format += f" but for {plain_ends} at each end of the pattern, as in training"
    facts = {"kind": kind, "parameters": f"{parameters:,}", "tensors": tensors, "number format": number_format}
    if kind != "vision":
        facts["language layers"] = f"{config.language.num_layers} (`{config.language.hybrid_pattern}`)"
        facts["vocabulary rows"] = config.language.vocab_size
    if kind != "language":
        facts["vision layers"] = config.vision.num_layers
        facts["tile"] = f"{config.vision.tile_size} px, {config.tokens_per_tile} visual tokens"
    sections = [
        f"---\nlibrary_name: nemovl\ntags: [nemotron-h, {kind}]\n---",
        f"# {config.name}",
        "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())]),
        "## How it was made",
        "\n".join(f"- **{k}**: {_value(v)}" for k, v in card.items()) or "No record was given to the export.",
        "## What opens this folder",
        _opens(config, kind, files),
        *([] if plain_ends is None else [FP8]),
        "## Files",
        "\n".join(["| file | SHA-256 |", "|---|---|", *(f"| `{k}` | `{v}` |" for k, v in files.items())]),
        "`nemovl convert verify FOLDER` checks names, shapes, hashes, the round trip and the logits.",
    ]
    return "\n\n".join(sections) + "\n"


def _opens(config: ModelConfig, kind: str, files: Mapping[str, str]) -> str:
    llama = kind != "vision" and is_llama(config.language)
    key = {"vlm": "llama", "language": "llama_language"}[kind] if llama else kind
    names = sorted(name for name in files if name.endswith(".py"))
    code = CODE.replace("{names}", ", ".join(f"`{n}`" for n in names)) if names else NO_CODE
    return OPENS[key].replace("{tower}", timm_name(config.vision)).replace("{code}", code)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else f"`{json.dumps(value, sort_keys=True)}`"
