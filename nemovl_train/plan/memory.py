"""Device memory of one rank, by component, from sizes alone.

Tensors that training keeps for its backward pass are counted layer by layer as the modules keep them. What shares a
tensor's width over tensor parallel ranks is divided by TP; inputs and outputs of norms are whole on every rank unless
sequence parallelism shares their tokens.
"""

import math
from dataclasses import dataclass, fields

from nemovl_train.config.adapters import adapted_linears, linears
from nemovl_train.config.precision import inner_layers
from nemovl_train.config.schema import LanguageConfig, RunConfig
from nemovl_train.model.chunks import TILES_AT_A_TIME, TILES_ENCODED_AGAIN, rows_at_a_time
from nemovl_train.plan.load import Grid, PackLoad
from nemovl_train.plan.policy import Policy, policy_of
from nemovl_train.plan.trainable import trainable

_TOWER_WIDTHS_KEPT = 16
"""Tower widths kept a token and block: norm in and out twice, q, k, v, attention out, and both sides of the GELU."""
_TOWER_WIDTHS_LIVE = 10
"""Tower widths that exist at once in a block that keeps nothing."""
_TOWER_WIDTHS_MADE_AGAIN = 6
"""Of those, norms out twice and the GELU out: what selective recomputation drops."""
_LOGIT_BYTES_WHOLE = 4
"""Of one logit where all exist at once, and of the copy that Transformer Engine's cross entropy turns into its gradient
(`pytorch/cross_entropy.py`, 2.20.2)."""
_FP8_COPY = (1 + 4 / 128) / 2
"""Of an input that an FP8 linear keeps for its weight, in bfloat16 numbers: a byte each, and a scale for each block."""
_FP8_TOWER_WIDTHS = 7 * _FP8_COPY - _TOWER_WIDTHS_MADE_AGAIN
"""Norms out twice, attention out and the GELU out a second time, in FP8; in bfloat16 the GELU and the norms out go."""
_INPUTS_IN_FLIGHT = 3
"""Layer inputs on the device while the others are in host memory: at work, on its way out or in, and the next one."""
_WHOLE_COPIES = 3
"""Copies of [S, H] whole on every tensor parallel rank: embeddings, with features in them, final hidden states."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at the worst moment of a step.

    Attributes:
        weights: Weights; in FP8 training also those that are kept quantised, by rows and by columns.
        gradients: Gradient buffers.
        optimizer: Master weights and moments.
        activations: What the language layers keep for backward.
        working: What they need beyond that and the logits when it is most: temporary tensors of the layer at work, less
            what the layers after it have given back.
        vision: Tower and projector: kept and temporary tensors.
        logits: Logits at work, before any layer has given anything back.
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
    fp8 = _fp8_layers(config, size.num_layers, config.precision.bf16_layers)
    kept, working = _language(size, grid, tokens, policy, frozen="language" not in trains, fp8=fp8)
    logits = _logits(size, grid, load, policy, width) if has_language else 0.0
    passing = {
        "activations": width * kept if has_language and needs_graph else 0.0,
        "working": max(width * working - logits, 0.0) if has_language else 0.0,
        "vision": width * _vision(config, grid, load, policy, trained="vision" in trains),
        "logits": logits,
    }
    states = _states(config, grid, policy, width)
    if policy.states_on_host:
        # They come back when all that a pack needs is gone: the larger of the two counts.
        states["optimizer"] = max(0.0, states["optimizer"] - sum(passing.values()))
    return Memory(**states, **passing, buffers=width * _WHOLE_COPIES * tokens * size.hidden_size)


def host_bytes(config: RunConfig, grid: Grid, load: PackLoad, policy: Policy) -> float:
    """Host memory of one rank: optimizer state and inputs of layers, where options move them there.

    Each tensor has a block of its own, and PyTorch rounds page-locked blocks up to powers of two
    (`aten/src/ATen/core/CachingHostAllocator.h`).
    """
    width = 4 if config.precision.params == "fp32" else 2
    found = 0.0
    if policy.states_on_host:
        found += sum(n * _rounding(config, grid, part) for part, n in _optimizer(config, grid, policy).items())
    if policy.inputs_on_host:
        size = config.model.language
        layers = size.num_layers if policy.full_recompute_layers is None else policy.full_recompute_layers
        residual = grid.tp if grid.sequence_parallel else 1
        found += layers * _block(width * size.hidden_size * load.seq_length / grid.cp / residual)
    if policy.tower_recompute == "offload" and load.tiles:
        tower = config.model.vision
        tokens = (tower.tile_size // tower.patch_size) ** 2 + tower.prefix_tokens
        calls, left = divmod(load.dealt_tiles(grid.pack_ranks), TILES_AT_A_TIME)
        tile = width * tokens * tower.hidden_size
        found += tower.num_layers * (calls * _block(tile * TILES_AT_A_TIME) + _block(tile * left))
    return found


def optimizer_bytes(config: RunConfig, grid: Grid, policy: Policy | None = None) -> float:
    """Bytes of the optimizer state that one rank holds, wherever it is."""
    return sum(_optimizer(config, grid, policy or policy_of(config)).values())


def _block(size: float) -> float:
    """Bytes of a page-locked block."""
    return 2.0 ** math.ceil(math.log2(size)) if size else 0.0


def _rounding(config: RunConfig, grid: Grid, part: str) -> float:
    """How much larger page-locked blocks of a part's optimizer state are than the state.

    As if each rank held whole matrices of its tensor parallel share; the distributed optimizer cuts a few of them.
    """
    row = trainable(config)[part]
    share = grid.tp if part == "language" else 1
    rank, size = config.adapter.rank, config.model.language
    whole = [linear for linear in linears(config.model) if linear.part == part] if row.whole else []
    counts = [linear.inputs * linear.outputs for linear in whole]
    if whole and part == "language":  # embedding and head
        counts += 2 * [size.vocab_size * size.hidden_size]
    adapted = [linear for linear in adapted_linears(config.model, config.adapter) if linear.part == part]
    counts += [rank * width for linear in adapted for width in (linear.inputs, linear.outputs)]
    pieces = [4 * count / share for count in counts]  # float32; half of it has the same ratio
    return sum(map(_block, pieces)) / sum(pieces) if pieces else 1.0


def _optimizer(config: RunConfig, grid: Grid, policy: Policy) -> dict[str, float]:
    """Bytes of optimizer state of one rank, by part."""
    # A float32 weight is its own master.
    each = policy.states.optimizer if config.precision.params != "fp32" else 8
    found = {}
    for part, row in trainable(config).items():
        share = grid.tp if part == "language" else 1
        holders = grid.gpus / share if config.optim.distributed else 1
        found[part] = row.trained / share * each / holders
    return found


def _states(config: RunConfig, grid: Grid, policy: Policy, width: int) -> dict[str, float]:
    """TP ranks share the language weights, all that hold the same its optimizer state; every rank shares the rest's."""
    weights = gradients = 0.0
    quantized = _quantized(config)
    for part, row in trainable(config).items():
        # Half of every adapter is whole on all TP ranks: too little to count.
        share = grid.tp if part == "language" else 1
        weights += (row.held * width + 2 * quantized.get(part, 0)) / share
        gradients += row.trained / share * policy.states.gradient
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer_bytes(config, grid, policy)}


def _fp8_layers(config: RunConfig, layers: int, ends: int) -> range:
    return inner_layers(layers, ends) if config.precision.fp8 == "blockwise" else range(0)


def _quantized(config: RunConfig) -> dict[str, int]:
    """Parameters of each part that FP8 training keeps quantised."""
    places = {
        "vision": _fp8_layers(config, config.model.vision.num_layers, config.precision.bf16_blocks),
        "language": _fp8_layers(config, config.model.language.num_layers, config.precision.bf16_layers),
    }
    found = dict.fromkeys(config.model.parts, 0)
    for linear in linears(config.model):
        inside = config.precision.fp8 == "blockwise"
        if linear.part in places:
            inside = int(linear.name.split(".")[2]) in places[linear.part]
        found[linear.part] += linear.inputs * linear.outputs * inside
    return found


def _language(
    size: LanguageConfig, grid: Grid, tokens: float, policy: Policy, *, frozen: bool, fp8: range
) -> tuple[float, float]:
    """Numbers that the layers of a rank keep, and how many more there are at the worst moment of backward."""
    residual = grid.tp if grid.sequence_parallel else 1
    layers = {
        (kind, inside): _kept(size, kind, grid, frozen, policy, inside) for kind in "M*-" for inside in (False, True)
    }
    one_layer = {key: split / grid.tp + whole / residual for key, (split, whole) in layers.items()}
    stack = [one_layer[kind, place in fp8] for place, kind in enumerate(size.hybrid_pattern)]
    recomputed = size.num_layers if policy.full_recompute_layers is None else policy.full_recompute_layers
    in_flight = min(_INPUTS_IN_FLIGHT / max(recomputed, 1), 1.0) if policy.inputs_on_host else 1.0
    held = [in_flight * size.hidden_size / residual] * recomputed + stack[recomputed:]
    dropped = {"M": size.mamba_inner_size, "*": 0, "-": size.ffn_hidden_size}
    worst = given_back = 0.0
    for place, kind in reversed(list(enumerate(size.hybrid_pattern))):
        made = _made_in_backward(size, kind, grid, tokens) / grid.tp
        if policy.selective_recompute:
            made += dropped[kind] / grid.tp + size.hidden_size / residual
        if place < recomputed:
            made += stack[place]
        worst = max(worst, made - given_back)
        given_back += held[place]
    return sum(held) * tokens, worst * tokens


def _kept(size: LanguageConfig, kind: str, grid: Grid, frozen: bool, policy: Policy, fp8: bool) -> tuple[float, float]:
    """Numbers a token that one layer keeps: those that TP splits, and those only sequence parallelism splits.

    A frozen linear does not keep its input: only its weight's gradient would need it. One in FP8 keeps a quantised copy
    whatever is recomputed, and nobody else keeps the original but attention its own output.
    """
    # Selective recomputation makes the inputs of linears again, but for the product of a SwiGLU.
    made_again = policy.selective_recompute and (kind != "-" or size.activation != "swiglu")
    read = 0.0 if frozen else _FP8_COPY if fp8 else 1.0
    norm = size.hidden_size * (1 + (read if fp8 or not policy.selective_recompute else 0))  # in, and out for a linear
    trained = read if fp8 or not made_again else 0.0
    if kind == "M":
        inner = size.mamba_inner_size
        channels = inner + 2 * size.mamba_num_groups * size.mamba_state_dim
        projected = inner + channels + size.mamba_num_heads
        return projected + inner * (1 + trained + (0 if policy.fused_gated_norm else 1)), norm
    if kind == "*":
        queries = size.num_attention_heads * size.head_dim
        seen = grid.cp if grid.gathers_keys(size) else 1
        qkv = queries + 2 * size.num_query_groups * size.head_dim * seen
        return qkv + queries * (1 + (read if fp8 else 0)) + 2 * size.num_attention_heads, norm
    inside = 3 if size.activation == "swiglu" else 1
    return size.ffn_hidden_size * (inside + trained), norm


def _made_in_backward(size: LanguageConfig, kind: str, grid: Grid, tokens: float) -> float:
    """Numbers a token, before TP, that a layer's backward pass makes beside what was kept."""
    if kind == "*":
        # Gradients of queries, keys, values and of the output.
        return (2.0 * size.num_attention_heads + 2 * size.num_query_groups) * size.head_dim
    if kind == "-":
        return 2.0 * size.ffn_hidden_size
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
    return made + states * (1 + 2 / pieces)


def _vision(config: RunConfig, grid: Grid, load: PackLoad, policy: Policy, *, trained: bool) -> float:
    """Numbers that tower and projector keep and use."""
    if not load.tiles:
        return 0.0
    model = config.model
    tiles = load.dealt_tiles(grid.pack_ranks)
    tower = model.vision
    tokens = (tower.tile_size // tower.patch_size) ** 2 + tower.prefix_tokens
    kept, widths = 0.0, float(_TOWER_WIDTHS_LIVE)
    at_once = min(tiles, TILES_AT_A_TIME)
    if trained:
        own = policy.tower_recompute
        dropped: dict[str, float] = {
            "none": 0,
            "selective": _TOWER_WIDTHS_MADE_AGAIN,
            "full": _TOWER_WIDTHS_KEPT - 1,
            "offload": _TOWER_WIDTHS_KEPT - _INPUTS_IN_FLIGHT / tower.num_layers,
        }
        if own == "tiles":
            again = min(tiles, TILES_ENCODED_AGAIN)
            kept = again * tokens * tower.hidden_size * tower.num_layers * _TOWER_WIDTHS_KEPT
            at_once = again
        else:
            kept = tiles * tokens * tower.hidden_size * tower.num_layers * (_TOWER_WIDTHS_KEPT - dropped[own])
            if own not in ("full", "offload"):
                blocks = len(_fp8_layers(config, tower.num_layers, config.precision.bf16_blocks))
                kept += tiles * tokens * tower.hidden_size * blocks * (_FP8_TOWER_WIDTHS + dropped[own])
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
    # Their kernels hold float32 numbers in registers alone.
    return min(positions, rows_at_a_time(math.ceil(rows), width)) * rows * width
