"""What one step works on, by arithmetic alone: documents and tiles of a pack, packs of a step, the grid of ranks."""

import math
from dataclasses import dataclass, replace

from nemovl_train.config.schema import LanguageConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How ranks share the work.

    Attributes:
        tp: Tensor parallel ranks.
        cp: Context parallel ranks.
        dp: Data parallel ranks.
        sequence_parallel: Whether tensor parallel ranks share the tokens between their linear layers.
        gpus_per_node: GPUs that one NVLink domain joins.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    gpus_per_node: int = 8

    @property
    def pack_ranks(self) -> int:
        """Ranks that share one pack."""
        return self.tp * self.cp

    def gathers_keys(self, size: LanguageConfig) -> bool:
        """Whether attention gathers keys and values of a whole pack: too few heads for the ranks to share them."""
        return bool(size.num_query_groups // self.tp % self.cp)

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.pack_ranks * self.dp

    @property
    def nodes(self) -> int:
        """Nodes that the ranks fill."""
        return math.ceil(self.gpus / self.gpus_per_node)


@dataclass(frozen=True, kw_only=True)
class PackLoad:
    """An average pack.

    Attributes:
        seq_length: Tokens it can hold.
        documents: Tokens of its samples.
        samples: Samples it stands for, on average.
        tiles: Tiles that the tower encodes.
        head_tokens: Supervised positions.
    """

    seq_length: int
    documents: tuple[int, ...]
    samples: float
    tiles: int = 0
    head_tokens: int = 0

    @property
    def useful_tokens(self) -> int:
        """Tokens of samples."""
        return sum(self.documents)

    def dealt_tiles(self, ranks: int) -> int:
        """Tiles that one of the ranks of a pack encodes, at most."""
        return math.ceil(self.tiles / ranks)

    @property
    def fill(self) -> float:
        """Share of the pack that holds samples."""
        return self.useful_tokens / self.seq_length

    @property
    def computed_documents(self) -> tuple[int, ...]:
        """Its documents and its padding, which is computed as one more."""
        tail = self.seq_length - self.useful_tokens
        return (*self.documents, tail) if tail else self.documents


def grid_of(config: RunConfig) -> Grid:
    """The grid of a config, on the GPUs it names, or on as many as one pack needs."""
    parallel, cluster = config.parallel, config.cluster
    ranks = parallel.tp * parallel.cp
    return Grid(
        tp=parallel.tp,
        cp=parallel.cp,
        dp=max((cluster.gpus or ranks) // ranks, 1),
        sequence_parallel=parallel.sequence_parallel,
        gpus_per_node=cluster.gpus_per_node,
    )


def pack_of(config: RunConfig) -> PackLoad:
    """An average pack under the assumptions of `workload`: samples of the mean length, the last one cut to the fill."""
    data, workload = config.data, config.workload
    if data.packing == "none":
        documents: tuple[int, ...] = (min(workload.sample_tokens, data.seq_length),)
    else:
        held = int(workload.fill * data.seq_length)
        whole, rest = divmod(held, min(workload.sample_tokens, held))
        documents = (min(workload.sample_tokens, held),) * whole + ((rest,) if rest else ())
    tokens = sum(documents)
    visual = workload.visual_fraction if "vision" in config.model.parts else 0.0
    return PackLoad(
        seq_length=data.seq_length,
        documents=documents,
        samples=tokens / min(workload.sample_tokens, data.seq_length),
        tiles=math.ceil(visual * tokens / _seen_of_a_tile(config)),
        head_tokens=round(workload.supervised_fraction * tokens),
    )


def heaviest(config: RunConfig, load: PackLoad) -> PackLoad:
    """A pack of images alone, which an average over packs hides and device memory has to hold."""
    return replace(load, tiles=int(config.data.seq_length / _seen_of_a_tile(config))) if load.tiles else load


def _seen_of_a_tile(config: RunConfig) -> float:
    """Tokens of a tile in the sequence. Where videos are pruned all tiles count as theirs, which is the most work."""
    return config.model.tokens_per_tile * (1 - config.data.video_pruning_rate)
