"""Llama's config fields, for the predecessor: its text model, and the folder `Llama-3.1-Nemotron-Nano-VL-8B-V1`.

Sources: Transformers `models/llama`, `modeling_rope_utils.py`; vLLM `nemotron_vl.py` for the vision-language folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemovl_train.config.schema import LanguageConfig, ModelConfig
from nemovl_train.convert.mapping import report
from nemovl_train.exceptions import ConversionError

VLM_ARCHITECTURE = "Llama_Nemotron_Nano_VL"
LANGUAGE_ARCHITECTURE = "LlamaForCausalLM"
# Settings that our model has fixed: field -> the only value it can express.
FIXED = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
# megatron-core stretches rotary wavelengths between these bounds alone.
ROPE_BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_llama(llm: Mapping[str, Any], rows: int, base_rows: int, where: Path) -> LanguageConfig:
    """Sizes of a Llama text model.

    Args:
        llm: Its config.
        rows: Rows of the embedding.
        base_rows: Rows before the media tags.
        where: The file, for messages.

    Raises:
        ConversionError: A missing field, or a setting that our model cannot express.
    """
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    needed = (*fields, "rms_norm_eps", "max_position_embeddings")
    report([f"field {f} is missing" for f in needed if llm.get(f) is None], str(where))
    # Transformers 5 joins base and stretching in one block.
    rope = llm.get("rope_parameters") or {**(llm.get("rope_scaling") or {}), "rope_theta": llm.get("rope_theta")}
    problems = [f"{k} is {llm[k]!r}, supported is {v!r}" for k, v in FIXED.items() if llm.get(k, v) != v]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type is {kind!r}, supported are 'default' and 'llama3'")
    elif kind == "llama3":
        problems += [f"{k} is {rope.get(k)!r}, supported is {v}" for k, v in ROPE_BOUNDS.items() if rope.get(k) != v]
    if rope.get("rope_theta") is None:
        problems.append("rope_theta is missing")
    report(problems, f"{where} describes a model that cannot be expressed here")
    heads = llm["num_attention_heads"]
    return LanguageConfig(
        hidden_size=llm["hidden_size"],
        hybrid_pattern="*-" * llm["num_hidden_layers"],
        num_attention_heads=heads,
        num_query_groups=llm["num_key_value_heads"],
        head_dim=llm.get("head_dim") or llm["hidden_size"] // heads,
        ffn_hidden_size=llm["intermediate_size"],
        norm_eps=llm["rms_norm_eps"],
        activation="swiglu",
        position="rope",
        rope_theta=float(rope["rope_theta"]),
        rope_scaling_factor=float(rope["factor"]) if kind == "llama3" else 1.0,
        max_position=llm["max_position_embeddings"],
        vocab_size=rows,
        base_vocab_size=base_rows,
        init_std=llm.get("initializer_range", LanguageConfig().init_std),
    )


def llama_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """`config.json` of a Llama text model, and `llm_config` of the predecessor.

    Raises:
        ConversionError: Rotary base that is no whole number (megatron-core takes only those).
    """
    lm = config.language
    if lm.rope_theta != int(lm.rope_theta):
        raise ConversionError(f"language.rope_theta={lm.rope_theta}: the model rounds it to {int(lm.rope_theta)}")
    scaling = {"rope_type": "llama3", "factor": lm.rope_scaling_factor, **ROPE_BOUNDS}
    return {
        "_name_or_path": config.name,
        "architectures": [LANGUAGE_ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": dtype,
        "vocab_size": lm.vocab_size,
        "hidden_size": lm.hidden_size,
        "num_hidden_layers": lm.num_layers // 2,
        "num_attention_heads": lm.num_attention_heads,
        "num_key_value_heads": lm.num_query_groups,
        "head_dim": lm.head_dim,
        "intermediate_size": lm.ffn_hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": lm.norm_eps,
        "rope_theta": lm.rope_theta,
        "rope_scaling": scaling if lm.rope_scaling_factor != 1.0 else None,
        "max_position_embeddings": lm.max_position,
        "initializer_range": lm.init_std,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": config.tokens.bos,
        "eos_token_id": config.tokens.eos,
        "pad_token_id": config.tokens.pad,
    }
