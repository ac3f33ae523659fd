"""The one table of tensor names and layouts: Hugging Face folder <-> canonical (megatron-core, TP 1, unfused norms).

Three kinds of folder exist. `vlm`: the released vision-language layout; `language`: the text model alone; `vision`: the
tower alone (`radio_model.*`). A text model has Nemotron-H names (`backbone.*`) or, in the predecessor, those of Llama
(`model.*`), where one layer is a pair of ours, `*-`. Public sources of the layouts: the model classes `nemotron_h`,
`llama`, `radio` and `nemotron_h_omni` of Transformers, vLLM `nemotron_vl.py`, and the bridges of
NVIDIA-NeMo/Megatron-Bridge.

Shape legend
    language   V vocabulary rows, H hidden, I Mamba inner (z, x), C conv channels (x, B, C),
               Z in_proj rows (z, x, B, C, dt), M Mamba heads, K conv kernel, F feed-forward,
               Q query rows, G key rows (= value rows), A = Q + 2G, D = 2F
    vision     E hidden, T = 3E, X pixels of a patch, N positions, R prefix tokens, W feed-forward
    projector  J = 4E pixel-shuffled width, L hidden
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from nemovl_train.config.schema import PARTS, LanguageConfig, ModelConfig
from nemovl_train.exceptions import ConversionError

KINDS = ("vlm", "language", "vision")


class Rule(Enum):
    """How the values of a canonical tensor relate to those of its Hugging Face tensors."""

    COPY = "copy"  # one tensor, same rows in the same order
    GROUPED_QKV = "grouped_qkv"  # q, k, v apart  <->  per key/value group g: [q of g..., k_g, v_g]
    STACKED = "stacked"  # several tensors, one above the other
    HEAD_QKV = "head_qkv"  # [all q, all k, all v]  <->  per head h: [q_h, k_h, v_h]


class Precision(Enum):
    """Which number format a tensor may have."""

    PARAMS = "params"  # the folder's one floating point format
    STATE = "state"  # float32 in canonical form; a folder may hold it in either format
    LOOSE = "loose"  # kept as found: the folder's format or float32


@dataclass(frozen=True)
class Row:
    """One line of the table. `hf` may name several tensors; their shapes then stand in `hf_shape`, `;` between."""

    ours: str
    hf: str
    shape: str
    rule: Rule = Rule.COPY
    hf_shape: str = ""
    precision: Precision = Precision.PARAMS


LANGUAGE_HEAD = (Row("embedding.word_embeddings.weight", "backbone.embeddings.weight", "V H"),)

# Each character of the pattern is one layer on both sides, with the same number.
LANGUAGE_LAYER = {
    "M": (
        Row("norm.weight", "norm.weight", "H"),
        Row("mixer.in_proj.weight", "mixer.in_proj.weight", "Z H"),
        Row("mixer.conv1d_weight", "mixer.conv1d.weight", "C 1 K"),
        Row("mixer.conv1d_bias", "mixer.conv1d.bias", "C"),
        Row("mixer.A_log", "mixer.A_log", "M", precision=Precision.STATE),
        Row("mixer.D", "mixer.D", "M", precision=Precision.STATE),
        Row("mixer.dt_bias", "mixer.dt_bias", "M", precision=Precision.LOOSE),
        Row("mixer.norm.weight", "mixer.norm.weight", "I"),
        Row("mixer.out_proj.weight", "mixer.out_proj.weight", "H I"),
    ),
    "*": (
        Row("input_layernorm.weight", "norm.weight", "H"),
        Row(
            "self_attention.linear_qkv.weight",
            "mixer.q_proj.weight mixer.k_proj.weight mixer.v_proj.weight",
            "A H",
            Rule.GROUPED_QKV,
            "Q H;G H;G H",
        ),
        Row("self_attention.linear_proj.weight", "mixer.o_proj.weight", "H Q"),
    ),
    "-": (
        Row("pre_mlp_layernorm.weight", "norm.weight", "H"),
        Row("mlp.linear_fc1.weight", "mixer.up_proj.weight", "F H"),
        Row("mlp.linear_fc2.weight", "mixer.down_proj.weight", "H F"),
    ),
}

LANGUAGE_TAIL = (
    Row("decoder.final_norm.weight", "backbone.norm_f.weight", "H"),
    Row("output_layer.weight", "lm_head.weight", "V H"),
)

LLAMA_HEAD = (Row("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H"),)

# One layer of Llama is two of ours: its attention, then its MLP.
LLAMA_LAYER = {
    "*": (
        Row("input_layernorm.weight", "input_layernorm.weight", "H"),
        Row(
            "self_attention.linear_qkv.weight",
            "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
            "A H",
            Rule.GROUPED_QKV,
            "Q H;G H;G H",
        ),
        Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H Q"),
    ),
    "-": (
        Row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
        Row("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", "D H", Rule.STACKED, "F H;F H"),
        Row("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H F"),
    ),
}

LLAMA_TAIL = (
    Row("decoder.final_norm.weight", "model.norm.weight", "H"),
    Row("output_layer.weight", "lm_head.weight", "V H"),
)

VISION_HEAD = (
    Row("class_token", "model.patch_generator.cls_token.token", "R E"),
    Row("position_embeddings", "model.patch_generator.pos_embed", "1 N E"),
    Row("embedder.weight", "model.patch_generator.embedder.weight", "E X"),
)

VISION_LAYER = (
    Row("input_layernorm.weight", "norm1.weight", "E"),
    Row("input_layernorm.bias", "norm1.bias", "E"),
    Row("self_attention.linear_qkv.weight", "attn.qkv.weight", "T E", Rule.HEAD_QKV),
    Row("self_attention.linear_qkv.bias", "attn.qkv.bias", "T", Rule.HEAD_QKV),
    Row("self_attention.linear_proj.weight", "attn.proj.weight", "E E"),
    Row("self_attention.linear_proj.bias", "attn.proj.bias", "E"),
    Row("pre_mlp_layernorm.weight", "norm2.weight", "E"),
    Row("pre_mlp_layernorm.bias", "norm2.bias", "E"),
    Row("mlp.linear_fc1.weight", "mlp.fc1.weight", "W E"),
    Row("mlp.linear_fc1.bias", "mlp.fc1.bias", "W"),
    Row("mlp.linear_fc2.weight", "mlp.fc2.weight", "E W"),
    Row("mlp.linear_fc2.bias", "mlp.fc2.bias", "E"),
)

PROJECTOR = (
    Row("norm.weight", "mlp1.0.weight", "J"),
    Row("linear_fc1.weight", "mlp1.1.weight", "L J"),
    Row("linear_fc2.weight", "mlp1.3.weight", "H L"),
)

# What the predecessor's projector has besides, by the option that adds it.
PROJECTOR_NORM_BIAS = (Row("norm.bias", "mlp1.0.bias", "J"),)
PROJECTOR_BIASES = (Row("linear_fc1.bias", "mlp1.1.bias", "L"), Row("linear_fc2.bias", "mlp1.3.bias", "H"))

# Tensors a folder may carry that are no parameters of ours: pixel statistics and the tower's summary tokens.
CONSTANTS = ("input_conditioner.norm_mean", "input_conditioner.norm_std", "summary_idxs")


@dataclass(frozen=True)
class Entry:
    """A row of the table for one layer of one model, with full names and sizes.

    Attributes:
        ours: Canonical name.
        hf: Names in the folder, in the order that `Rule` expects.
        shape: Canonical shape.
        hf_shapes: Shape of each tensor in `hf`.
        groups: Number of blocks that an interleaving rule makes (key/value groups, or heads).
    """

    ours: str
    hf: tuple[str, ...]
    rule: Rule
    shape: tuple[int, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    groups: int
    precision: Precision


def kind_of(config: ModelConfig) -> str:
    """Kind of folder that holds a model with these parts.

    Raises:
        ConversionError: No layout has just these parts.
    """
    kinds = {frozenset(PARTS): "vlm", frozenset({"language"}): "language", frozenset({"vision"}): "vision"}
    kind = kinds.get(frozenset(config.parts))
    if kind is None:
        raise ConversionError(f"{config.name}: parts {list(config.parts)}; a folder holds all, or language, or vision")
    return kind


def language_prefix(kind: str) -> str:
    """Prefix of the language model's tensors in a folder of this kind."""
    return "language_model." if kind == "vlm" else ""


def vision_prefix(kind: str) -> str:
    """Prefix of the tower's tensors in a folder of this kind."""
    return "vision_model.radio_model." if kind == "vlm" else "radio_model."


def constant_names(kind: str) -> dict[str, str]:
    """Short name -> name in the folder, of the tensors in `CONSTANTS`; empty where there is no tower."""
    return {} if kind == "language" else {name: vision_prefix(kind) + name for name in CONSTANTS}


def table(config: ModelConfig, kind: str) -> list[Entry]:
    """Every tensor of a model, in the order in which an exported folder stores them.

    Args:
        config: Sizes of the model.
        kind: `vlm`, `language` or `vision`.

    Raises:
        ConversionError: The model has layers that this Hugging Face layout cannot express.
    """
    assert kind in KINDS, kind
    entries: list[Entry] = []
    if kind != "vision":
        entries += _language(config)
        if kind == "vlm":
            entries = [_prefixed(e, "language_model.") for e in entries]
    if kind != "language":
        entries += _vision(config, vision_prefix(kind))
    if kind == "vlm":
        joined, hidden = 4 * config.vision.hidden_size, config.language.hidden_size
        dims = {"J": joined, "L": config.projector.ffn_hidden_size, "H": hidden}
        rows: tuple[Row, ...] = PROJECTOR
        rows += PROJECTOR_NORM_BIAS if config.projector.norm == "layernorm" else ()
        rows += PROJECTOR_BIASES if config.projector.bias else ()
        entries += [_entry(row, "projector.", "", dims) for row in rows]
    return entries


def language_dims(lm: LanguageConfig) -> dict[str, int]:
    """Sizes behind the letters of the language rows."""
    inner, shared = lm.mamba_inner_size, 2 * lm.mamba_num_groups * lm.mamba_state_dim
    query, key = lm.num_attention_heads * lm.head_dim, lm.num_query_groups * lm.head_dim
    return {
        "V": lm.vocab_size,
        "H": lm.hidden_size,
        "I": inner,
        "C": inner + shared,
        "Z": 2 * inner + shared + lm.mamba_num_heads,
        "M": lm.mamba_num_heads,
        "K": lm.conv_kernel,
        "F": lm.ffn_hidden_size,
        "D": 2 * lm.ffn_hidden_size,
        "Q": query,
        "G": key,
        "A": query + 2 * key,
    }


def is_llama(lm: LanguageConfig) -> bool:
    """Whether a text model has Llama's layout; otherwise it has Nemotron-H's.

    Raises:
        ConversionError: It has neither.
    """
    form = (lm.activation, lm.position)
    if form == ("swiglu", "rope") and lm.hybrid_pattern == "*-" * (lm.num_layers // 2):
        return True
    if form == ("squared_relu", "none"):
        return False
    raise ConversionError(
        f"a language model with activation {lm.activation!r}, position {lm.position!r} and layers "
        f"{lm.hybrid_pattern!r} has no Hugging Face layout: Nemotron-H has squared_relu and none, Llama swiglu, rope "
        "and pairs of *-"
    )


def _language(config: ModelConfig) -> Iterator[Entry]:
    lm = config.language
    llama = is_llama(lm)
    head, layers, tail = (
        (LLAMA_HEAD, LLAMA_LAYER, LLAMA_TAIL) if llama else (LANGUAGE_HEAD, LANGUAGE_LAYER, LANGUAGE_TAIL)
    )
    dims = language_dims(lm)
    for row in head:
        yield _entry(row, "language_model.", "", dims)
    for n, character in enumerate(lm.hybrid_pattern):
        if character not in layers:
            raise ConversionError(f"hybrid_pattern has {character!r} at layer {n}; known are {', '.join(layers)}")
        theirs = f"model.layers.{n // 2}." if llama else f"backbone.layers.{n}."
        for row in layers[character]:
            yield _entry(row, f"language_model.decoder.layers.{n}.", theirs, dims, groups=lm.num_query_groups)
    for row in tail:
        yield _entry(row, "language_model.", "", dims)


def _vision(config: ModelConfig, prefix: str) -> Iterator[Entry]:
    vision = config.vision
    dims = {
        "E": vision.hidden_size,
        "T": 3 * vision.hidden_size,
        "X": 3 * vision.patch_size**2,
        "N": vision.position_grid**2,
        "R": vision.prefix_tokens,
        "W": vision.ffn_hidden_size,
    }
    for row in VISION_HEAD:
        yield _entry(row, "vision_model.", prefix, dims)
    for n in range(vision.num_layers):
        for row in VISION_LAYER:
            ours, theirs = f"vision_model.decoder.layers.{n}.", f"{prefix}model.blocks.{n}."
            yield _entry(row, ours, theirs, dims, groups=vision.num_attention_heads)


def _entry(row: Row, ours: str, theirs: str, dims: dict[str, int], *, groups: int = 1) -> Entry:
    def sizes(letters: str) -> tuple[int, ...]:
        return tuple(dims[d] if d in dims else int(d) for d in letters.split())

    return Entry(
        ours=ours + row.ours,
        hf=tuple(theirs + name for name in row.hf.split()),
        rule=row.rule,
        shape=sizes(row.shape),
        hf_shapes=tuple(sizes(s) for s in (row.hf_shape or row.shape).split(";")),
        groups=groups,
        precision=row.precision,
    )


def _prefixed(entry: Entry, prefix: str) -> Entry:
    return Entry(**{**vars(entry), "hf": tuple(prefix + name for name in entry.hf)})
