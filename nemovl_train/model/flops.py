"""Model FLOPs of a pack and parameter counts by part, from sizes alone. Imports no torch.

Conventions. One multiply-add is 2 FLOPs. Model FLOPs never count recomputation. Causal attention counts half the
square of each *document's* length, not of the pack's. Norms, activations, softmax, residual additions and the
embedding lookup are left out: together they are well under one percent at the released sizes.

The chunked Mamba-2 scan follows the matrix form of state space duality (Dao and Gu, arXiv 2405.21060, section 6).
It is counted as the kernels run it, with full chunk x chunk tiles; chunks lie on a grid over the pack, so document
boundaries neither add nor save work there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemovl_train.config.schema import PARTS, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig

_CHANNELS = 3
_SHUFFLED_PATCHES = 4
"""Patches that the 2 x 2 pixel shuffle joins into one visual token."""


@dataclass(frozen=True, kw_only=True)
class PackFlops:
    """FLOPs of one pack, forward and backward, by kind of work.

    Attributes:
        mamba: Mamba-2 layers: projections, convolution and scan.
        attention: Attention layers: projections and the causal core.
        mlp: Feed-forward layers.
        head: Output layer.
        vision: Vision tower.
        projector: Projector.
        attention_core: Part of `attention`: scores and their product with the values, without the projections.
    """

    mamba: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    head: float = 0.0
    vision: float = 0.0
    projector: float = 0.0
    attention_core: float = 0.0

    @property
    def language(self) -> float:
        """FLOPs of the language model, head included."""
        return self.mamba + self.attention + self.mlp + self.head

    @property
    def total(self) -> float:
        """FLOPs of the whole pack."""
        return self.language + self.vision + self.projector


@dataclass(frozen=True)
class _Passes:
    """How many forward passes' worth of work a part costs.

    Attributes:
        weights: Matrix products with a weight: 1 forward, 1 for the input's gradient, 1 for the weight's.
        mixing: Products without weights (scan, convolution, attention core): 1, or 3 with a backward pass.
    """

    weights: int
    mixing: int


def _passes(*, trained: bool, gradient_flows: bool) -> _Passes:
    if trained:
        return _Passes(3, 3)
    return _Passes(2, 3) if gradient_flows else _Passes(1, 1)


def training_flops(
    config: ModelConfig,
    *,
    document_lengths: Sequence[int],
    num_tiles: int,
    head_tokens: int,
    train: Sequence[str] = PARTS,
    adapted: Sequence[str] = (),
) -> PackFlops:
    """Model FLOPs of one training step on one pack.

    Frozen parts cost less: a frozen language model still passes gradients down to the visual tokens (no weight
    gradients), and costs its forward pass alone when the pack has no tiles or nothing below it trains. Adapters let
    gradients flow through their whole part; their own work is left out: at rank 16 under one percent of the layer's.

    Args:
        config: Sizes of the parts.
        document_lengths: Tokens of each document of the pack. Leave the padding tail out to count useful work only.
        num_tiles: Tiles that the tower encodes.
        head_tokens: Positions at which logits are made: the supervised ones in training, all for plain logits.
        train: Parts whose weights get gradients; empty for a forward pass.
        adapted: Parts with adapters.

    Returns:
        FLOPs by kind of work.
    """
    assert set(train) <= set(PARTS), f"parts are some of {PARTS}, not {train}"
    learns = {*train, *adapted}
    tiles_need_grad = num_tiles > 0 and bool(learns & {"vision", "projector"})
    language = _passes(trained="language" in train, gradient_flows=tiles_need_grad or "language" in learns)
    projector = _passes(trained="projector" in train, gradient_flows=bool(learns & {"vision", "projector"}))
    vision = _passes(trained="vision" in train, gradient_flows="vision" in learns)
    size = config.language
    tokens = sum(document_lengths)
    squares = sum(length * length for length in document_lengths)
    kinds = {kind: size.hybrid_pattern.count(kind) for kind in "M*-"}
    core = kinds["*"] * language.mixing * squares * 2 * size.num_attention_heads * size.head_dim
    return PackFlops(
        mamba=kinds["M"]
        * tokens
        * (language.weights * _mamba_projections(size) + language.mixing * (_convolution(size) + _scan(size))),
        attention=kinds["*"] * language.weights * tokens * _attention_projections(size) + core,
        mlp=kinds["-"] * tokens * language.weights * _mlp(size),
        head=head_tokens * language.weights * 2 * size.hidden_size * size.vocab_size,
        vision=num_tiles * _tile(config.vision, vision),
        projector=num_tiles * config.tokens_per_tile * projector.weights * _projector_token(config),
        attention_core=core,
    )


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part.

    Args:
        config: Sizes of the parts; the embedding and the head count `language.vocab_size` rows each.

    Returns:
        Parameter count of each of `config.parts`.
    """
    counts = {
        "vision": _vision_parameters(config.vision),
        "projector": _projector_parameters(config.vision, config.projector, config.language),
        "language": _language_parameters(config.language),
    }
    return {part: counts[part] for part in config.parts}


def _conv_channels(size: LanguageConfig) -> int:
    return size.mamba_inner_size + 2 * size.mamba_num_groups * size.mamba_state_dim


def _in_projection_rows(size: LanguageConfig) -> int:
    """Rows z, x, B, C and dt of a Mamba layer's input projection."""
    return size.mamba_inner_size + _conv_channels(size) + size.mamba_num_heads


def _qkv_rows(size: LanguageConfig) -> int:
    return (size.num_attention_heads + 2 * size.num_query_groups) * size.head_dim


def _mlp_matrices(size: LanguageConfig) -> int:
    """Weight matrices of a feed-forward layer: SwiGLU has a gate beside the up projection."""
    return 3 if size.activation == "swiglu" else 2


def _mamba_projections(size: LanguageConfig) -> int:
    return 2 * size.hidden_size * (_in_projection_rows(size) + size.mamba_inner_size)


def _convolution(size: LanguageConfig) -> int:
    return 2 * size.conv_kernel * _conv_channels(size)


def _scan(size: LanguageConfig) -> int:
    """Chunked scan, forward FLOPs a token."""
    state_product = 2 * size.mamba_inner_size * size.mamba_state_dim
    scores = 2 * size.mamba_num_groups * size.mamba_state_dim * size.chunk_size  # C B^T, once a group
    inside_chunk = 2 * size.mamba_inner_size * size.chunk_size  # (decay * C B^T) x
    return scores + inside_chunk + 2 * state_product  # into the chunk's state, and out of the state before it


def _attention_projections(size: LanguageConfig) -> int:
    return 2 * size.hidden_size * (_qkv_rows(size) + size.num_attention_heads * size.head_dim)


def _mlp(size: LanguageConfig) -> int:
    return 2 * _mlp_matrices(size) * size.hidden_size * size.ffn_hidden_size


def _tile(size: VisionConfig, passes: _Passes) -> int:
    """One tile through the tower; the attention is bidirectional, over patches and prefix tokens."""
    patches = (size.tile_size // size.patch_size) ** 2
    tokens = patches + size.prefix_tokens
    weights = 4 * size.hidden_size**2 + 2 * size.hidden_size * size.ffn_hidden_size
    embedding = 2 * _CHANNELS * size.patch_size**2 * size.hidden_size * patches
    layer = passes.weights * 2 * weights * tokens + passes.mixing * 4 * tokens**2 * size.hidden_size
    # Pixels have no gradient: the patch embedding's backward is the weight's alone.
    return size.num_layers * layer + min(passes.weights, 2) * embedding


def _projector_token(config: ModelConfig) -> int:
    widths = _SHUFFLED_PATCHES * config.vision.hidden_size + config.language.hidden_size
    return 2 * config.projector.ffn_hidden_size * widths


def _language_parameters(size: LanguageConfig) -> int:
    hidden, inner, conv = size.hidden_size, size.mamba_inner_size, _conv_channels(size)
    layer = {
        # projections, convolution with bias, A_log + D + dt_bias, gated norm
        "M": hidden * (_in_projection_rows(size) + inner)
        + conv * (size.conv_kernel + 1)
        + 3 * size.mamba_num_heads
        + inner,
        "*": hidden * (_qkv_rows(size) + size.num_attention_heads * size.head_dim),
        "-": _mlp_matrices(size) * hidden * size.ffn_hidden_size,
    }
    layers = sum(layer[kind] + hidden for kind in size.hybrid_pattern)  # + the norm in front of each
    return layers + hidden + 2 * size.vocab_size * hidden


def _vision_parameters(size: VisionConfig) -> int:
    width, ffn = size.hidden_size, size.ffn_hidden_size
    block = 4 * width**2 + 4 * width + 2 * width * ffn + ffn + width + 4 * width
    embedding = _CHANNELS * size.patch_size**2 * width
    return size.num_layers * block + embedding + (size.position_grid**2 + size.prefix_tokens) * width


def _projector_parameters(vision: VisionConfig, size: ProjectorConfig, language: LanguageConfig) -> int:
    joined = _SHUFFLED_PATCHES * vision.hidden_size
    norm = joined * (2 if size.norm == "layernorm" else 1)
    biases = size.ffn_hidden_size + language.hidden_size if size.bias else 0
    return norm + biases + size.ffn_hidden_size * (joined + language.hidden_size)
