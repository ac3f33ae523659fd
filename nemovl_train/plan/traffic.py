"""Bytes that one GPU moves in a step, by purpose, and the link that carries them.

A collective over r ranks moves (r - 1) / r of its tensor past each of them.
"""

from dataclasses import dataclass

from nemovl_train.config.schema import RunConfig
from nemovl_train.plan.hardware import NETWORK_BYTES, Gpu
from nemovl_train.plan.load import Grid, PackLoad
from nemovl_train.plan.policy import Policy
from nemovl_train.plan.trainable import trainable

NVLINK, NETWORK = "nvlink", "network"
_COLLECTIVES_SP = 5
"""Of [S, H] a layer with sequence parallelism: gather, scatter forward; gather, scatter, one more gather backward."""
_COLLECTIVES_PLAIN = 4
"""Without it: one all-reduce forward and one backward, each as much as two of the others."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One purpose of communication.

    Attributes:
        purpose: `tensor parallel`, `context parallel`, `features` (of tiles, to the ranks that hold their tokens), or
            `gradients` and `weights` with the parts they belong to.
        bytes_per_step: Past each GPU.
        link: `nvlink` inside a node, `network` when the ranks are on several.
        seconds: On this link, nothing hidden behind work.
    """

    purpose: str
    bytes_per_step: float
    link: str
    seconds: float


def flows(config: RunConfig, grid: Grid, load: PackLoad, policy: Policy, gpu: Gpu, *, packs: int) -> list[Flow]:
    """Communication of one step.

    Args:
        config: Model, and parts that train.
        grid: How ranks share the work.
        load: An average pack.
        policy: How wide gradients are.
        gpu: Type of the GPUs.
        packs: Packs of the step that one group of TP x CP ranks takes.
    """
    width = 4 if config.precision.params == "fp32" else 2
    tokens = load.seq_length / grid.cp * packs
    found = []
    if "language" in config.model.parts:
        found = [
            _flow("tensor parallel", tokens * _tensor(config, grid, width), grid, gpu, 1, grid.tp),
            _flow("context parallel", _context(config, grid, tokens, width, packs), grid, gpu, grid.tp, grid.cp),
            _flow("features", packs * _features(config, grid, load, width), grid, gpu, 1, grid.pack_ranks),
        ]
    trained = {part: row.trained for part, row in trainable(config).items() if row.learns}
    language, rest = trained.pop("language", 0) / grid.tp, sum(trained.values())
    # Numbers that are equal on some ranks, the distance between those ranks, and how many they are.
    sides = {"language": (language, grid.tp, grid.gpus // grid.tp), " and ".join(trained): (rest, 1, grid.gpus)}
    for name, (numbers, stride, ranks) in sides.items():
        share = numbers * (ranks - 1) / ranks
        found.append(_flow(f"gradients, {name}", share * policy.states.gradient, grid, gpu, stride, ranks))
        found.append(_flow(f"weights, {name}", share * width, grid, gpu, stride, ranks))
    return [flow for flow in found if flow.bytes_per_step]


def _tensor(config: RunConfig, grid: Grid, width: int) -> float:
    """Bytes a token of a rank's share of the pack."""
    size = config.model.language
    rounds = _COLLECTIVES_SP if grid.sequence_parallel else _COLLECTIVES_PLAIN
    if grid.sequence_parallel and "language" not in config.trainer.train:
        rounds -= 1  # no weight gradient asks for the input again
    return rounds * size.num_layers * size.hidden_size * width * (grid.tp - 1) / grid.tp


def _context(config: RunConfig, grid: Grid, tokens: float, width: int, packs: int) -> float:
    """Of all layers, both ways.

    Attention sends q, k, v to heads and the result back, or gathers k and v; a Mamba layer sends its state, or its
    columns to heads and the result back.
    """
    size = config.model.language
    others, keys = grid.cp - 1, 2 * size.num_query_groups * size.head_dim
    if grid.gathers_keys(size):
        attention = 2 * tokens * keys * width / grid.tp * others
    else:
        exchanged = 2 * size.num_attention_heads * size.head_dim + keys
        attention = 2 * tokens * exchanged * width / grid.tp * others / grid.cp
    inner = size.mamba_inner_size
    if config.parallel.mamba_context == "head_exchange":
        columns = 3 * inner + 2 * size.mamba_num_groups * size.mamba_state_dim + size.mamba_num_heads
        mamba = 2 * tokens * columns * width / grid.tp * others / grid.cp
    else:
        mamba = 2 * packs * others * inner * size.mamba_state_dim * 4 / grid.tp
    return size.hybrid_pattern.count("*") * attention + size.hybrid_pattern.count("M") * mamba


def _features(config: RunConfig, grid: Grid, load: PackLoad, width: int) -> float:
    """Of one pack; no more than this, since a rank keeps the features of its own tokens."""
    holders = 1 if grid.sequence_parallel else grid.tp
    rows = trainable(config)
    both_ways = 2 if any(rows[part].learns for part in ("vision", "projector") if part in rows) else 1
    made = load.tiles * config.model.tokens_per_tile / grid.pack_ranks
    others = (grid.pack_ranks - 1) / grid.pack_ranks
    return both_ways * made * holders * config.model.language.hidden_size * width * others


def _flow(purpose: str, amount: float, grid: Grid, gpu: Gpu, stride: int, ranks: int) -> Flow:
    """The link of a group of `ranks` ranks that are `stride` apart."""
    if stride * ranks <= grid.gpus_per_node or grid.gpus <= grid.gpus_per_node:
        return Flow(purpose=purpose, bytes_per_step=amount, link=NVLINK, seconds=amount / gpu.nvlink_bytes)
    # Several members in a node share its adapters in turn: the ring passes each node once.
    members = max(grid.gpus_per_node // stride, 1)
    rate = min(gpu.nvlink_bytes, members * NETWORK_BYTES)
    return Flow(purpose=purpose, bytes_per_step=amount, link=NETWORK, seconds=amount / rate)
