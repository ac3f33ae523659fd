"""Device memory of one rank, by component, from sizes alone.

Tensors that training keeps for its backward pass are counted layer by layer as the modules keep them. What shares a
tensor's width over tensor parallel ranks is divided by TP; inputs and outputs of norms are whole on every rank unless
sequence parallelism shares their tokens.
"""

import math
from dataclasses import dataclass, fields

from nemovl_train.config.schema import LanguageConfig, RunConfig
from nemovl_train.model.chunks import FLOAT_LOGITS, TILES_AT_A_TIME, TILES_ENCODED_AGAIN, rows_at_a_time
from nemovl_train.plan.load import Grid, PackLoad
from nemovl_train.plan.policy import Policy, policy_of
from nemovl_train.plan.trainable import trainable

_TOWER_WIDTHS_KEPT = 16
"""Tower widths kept a token and block: norm in and out twice, q, k, v, attention out, and both sides of the GELU."""
_TOWER_WIDTHS_LIVE = 10
"""Tower widths that exist at once in a block that keeps nothing."""
_TOWER_WIDTHS_MADE_AGAIN = 6
"""Of those, norms out twice and the GELU out: what selective recomputation drops."""
_FLOAT_LOGIT_COPIES = 3
"""Float32 numbers of a logit in the block at work, and its share in sums."""
_LOGIT_BYTES_WHOLE = 2
"""Of one logit under a fused cross entropy, whose gradient takes the logits' place."""
_WHOLE_COPIES = 3
"""Copies of [S, H] whole on every tensor parallel rank: embeddings, with features in them, final hidden states."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at the worst moment of a step.

    Attributes:
        weights: Weights.
        gradients: Gradient buffers.
        optimizer: Master weights and moments.
        activations: What the language layers keep for backward.
        working: Temporary tensors of the layer at work.
        vision: Tower and projector: kept and temporary tensors.
        logits: Logits at work.
        buffers: Embeddings and hidden states outside the layers.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    vision: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it: PyTorch's pool at its peak."""
        return sum(getattr(self, item.name) for item in fields(self))

    def components(self) -> dict[str, float]:
        """Bytes by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def memory(config: RunConfig, grid: Grid, load: PackLoad, policy: Policy | None = None) -> Memory:
    """Memory of one rank.

    Args:
        config: Model, parts that train, number formats.
        grid: How ranks share the work.
        load: The pack; the one with the most tiles decides whether a run fits.
        policy: What the training program keeps and recomputes; by the config when None.
    """
    policy = policy or policy_of(config)
    width = 4 if config.precision.params == "fp32" else 2
    size, tokens = config.model.language, load.seq_length / grid.cp
    has_language = "language" in config.model.parts
    trains = {part for part, row in trainable(config).items() if row.learns}
    needs_graph = "language" in trains or load.tiles > 0
    # An adapter keeps its layer's input, as the layer itself does when it trains.
    kept, working = _language(size, grid, tokens, policy, frozen="language" not in trains)
    return Memory(
        **_states(config, grid, policy, width),
        activations=width * kept if has_language and needs_graph else 0.0,
        working=width * working if has_language else 0.0,
        vision=width * _vision(config, grid, load, policy, trained="vision" in trains),
        logits=_logits(size, grid, load, policy, width) if has_language else 0.0,
        buffers=width * _WHOLE_COPIES * tokens * size.hidden_size,
    )


def _states(config: RunConfig, grid: Grid, policy: Policy, width: int) -> dict[str, float]:
    """TP ranks share the language weights, all that hold the same its optimizer state; every rank shares the rest's."""
    states = policy.states
    # A float32 weight is its own master.
    state_bytes = states.optimizer if width == 2 else 8
    weights = gradients = optimizer = 0.0
    for part, row in trainable(config).items():
        # Half of every adapter is whole on all TP ranks: too little to count.
        share = grid.tp if part == "language" else 1
        holders = grid.gpus / share
        weights += row.held / share * width
        gradients += row.trained / share * states.gradient
        optimizer += row.trained / share * state_bytes / (holders if config.optim.distributed else 1)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def _language(size: LanguageConfig, grid: Grid, tokens: float, policy: Policy, *, frozen: bool) -> tuple[float, float]:
    """Numbers that the layers of a rank keep, and that exist only while one of them is at work."""
    residual = grid.tp if grid.sequence_parallel else 1
    layers = {kind: _kept(size, kind, grid, frozen, policy) for kind in "M*-"}
    one_layer = {kind: split / grid.tp + whole / residual for kind, (split, whole) in layers.items()}
    recomputed = size.num_layers if policy.full_recompute_layers is None else policy.full_recompute_layers
    kept = recomputed * size.hidden_size / residual
    kept += sum(one_layer[kind] for kind in size.hybrid_pattern[recomputed:])
    working = _backward_peak(size, grid, tokens) / grid.tp
    if policy.selective_recompute:
        working += max(size.ffn_hidden_size, size.mamba_inner_size) / grid.tp + size.hidden_size / residual
    if recomputed:
        working += max(one_layer[kind] for kind in size.hybrid_pattern[:recomputed])
    return kept * tokens, working * tokens


def _kept(size: LanguageConfig, kind: str, grid: Grid, frozen: bool, policy: Policy) -> tuple[float, float]:
    """Numbers a token that one layer keeps: those that TP splits, and those only sequence parallelism splits.

    A frozen linear does not keep its input: only its weight's gradient would need it.
    """
    # Selective recomputation makes the inputs of linears again, but for the product of a SwiGLU.
    made_again = policy.selective_recompute and (kind != "-" or size.activation != "swiglu")
    norm = size.hidden_size * (1 if frozen or policy.selective_recompute else 2)  # in, and out for the projection
    trained = 0 if frozen or made_again else 1
    if kind == "M":
        inner = size.mamba_inner_size
        channels = inner + 2 * size.mamba_num_groups * size.mamba_state_dim
        projected = inner + channels + size.mamba_num_heads
        return projected + inner * (1 + trained + (0 if policy.fused_gated_norm else 1)), norm
    if kind == "*":
        queries = size.num_attention_heads * size.head_dim
        seen = grid.cp if grid.gathers_keys(size) else 1
        qkv = queries + 2 * size.num_query_groups * size.head_dim * seen
        return qkv + queries + 2 * size.num_attention_heads, norm
    inside = 3 if size.activation == "swiglu" else 1
    return size.ffn_hidden_size * (inside + trained), norm


def _backward_peak(size: LanguageConfig, grid: Grid, tokens: float) -> float:
    """Numbers a token, before TP, that the hungriest layer's backward pass makes beside what was kept."""
    mlp = 2.0 * size.ffn_hidden_size
    if "M" not in size.hybrid_pattern:
        return mlp
    inner, groups = size.mamba_inner_size, size.mamba_num_groups
    convolved = inner + 2 * groups * size.mamba_state_dim
    projected = inner + convolved + size.mamba_num_heads
    # Gradients of the layer's output, of the scan's and of the projection's; the convolution's output and its gradient.
    made = 2 * inner + projected + 2 * convolved
    # Products of every c with every b of its chunk and their gradients, float32: two numbers' room each.
    made += 2 * 2 * groups * size.chunk_size
    # Chunk states, float32 too: their gradients from each chunk's outputs, of all pieces of a pack that is too long for
    # one call; and for one piece at a time the states and those passed on.
    states = 2 * inner * size.mamba_state_dim / size.chunk_size
    columns = max(
        projected, inner * size.mamba_state_dim // size.chunk_size, size.mamba_num_heads * size.mamba_state_dim
    )
    pieces = math.ceil(tokens * columns / grid.tp / 2**31)
    return max(mlp, made + states * (1 + 2 / pieces))


def _vision(config: RunConfig, grid: Grid, load: PackLoad, policy: Policy, *, trained: bool) -> float:
    """Numbers that tower and projector keep and use."""
    if not load.tiles:
        return 0.0
    model = config.model
    tiles = load.dealt_tiles(grid.pack_ranks)
    tower = model.vision
    tokens = (tower.tile_size // tower.patch_size) ** 2 + tower.prefix_tokens
    kept, widths = 0.0, _TOWER_WIDTHS_LIVE
    at_once = min(tiles, TILES_AT_A_TIME)
    if trained:
        own = policy.tower_recompute
        dropped = {"none": 0, "selective": _TOWER_WIDTHS_MADE_AGAIN, "full": _TOWER_WIDTHS_KEPT - 1}
        if own == "tiles":
            again = min(tiles, TILES_ENCODED_AGAIN)
            kept = again * tokens * tower.hidden_size * tower.num_layers * _TOWER_WIDTHS_KEPT
            at_once = again
        else:
            kept = tiles * tokens * tower.hidden_size * tower.num_layers * (_TOWER_WIDTHS_KEPT - dropped[own])
            widths += dropped[own]
    live = at_once * tokens * tower.hidden_size * widths
    joined = 4 * tower.hidden_size
    projector = 2 * joined + 2 * model.projector.ffn_hidden_size + model.language.hidden_size
    return kept + live + tiles * model.tokens_per_tile * projector


def _logits(size: LanguageConfig, grid: Grid, load: PackLoad, policy: Policy, width: int) -> float:
    rows = size.vocab_size / grid.tp
    positions = (load.seq_length if policy.head_everywhere else load.head_tokens) / grid.cp
    if not policy.chunked_loss:
        return positions * rows * _LOGIT_BYTES_WHOLE
    logits = min(positions, rows_at_a_time(math.ceil(rows), width)) * rows
    return logits * width + _FLOAT_LOGIT_COPIES * 4 * min(logits, FLOAT_LOGITS)
