"""What the data side needs to know about a run. Plain dataclasses: importable without torch."""

from dataclasses import dataclass, field

PACKING_MODES = ("bfd", "balanced", "sequential", "none")
LOSS_MODES = ("token", "sample", "square")
LOSS_UNITS = ("sample", "turn")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset folder of a blend.

    Attributes:
        path: Dataset folder (shards and manifest), as written by `nemovl data`, or an fsspec URL of one.
        split: Name of the split inside the folder.
        weight: Share of the blend in samples, relative to the other sources.
        epochs: Passes over this source for each pass of the blend, instead of a weight; all sources of a blend have
            the one or the other.
        max_samples: Use only the first samples of the split's order; all when None.
    """

    path: str
    split: str = "train"
    weight: float = 1.0
    epochs: float | None = None
    max_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class LossWeightConfig:
    """How much each supervised token counts, before the divisor.

    Attributes:
        mode: `token` gives every token weight 1, `sample` 1/n, `square` 1/sqrt(n) (InternVL 2.5, arXiv 2412.05271).
        unit: n counts the supervised tokens of the whole `sample`, or of each assistant `turn`.
    """

    mode: str = "square"
    unit: str = "sample"


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What a pack costs, in units of one token through the language model; packs of like cost share a step.

    The defaults are FLOPs of the 12B model, forward and backward: a tile is 4.8 TFLOP of tower and projector, a token
    67 GFLOP of language model, and a document of n tokens 0.18 MFLOP x n^2 of causal attention.

    Attributes:
        visual_token: Tower and projector, for each visual token.
        attention_pair: Attention core, for each pair of tokens of a document (length squared).
    """

    visual_token: float = 0.28
    attention_pair: float = 2.8e-6


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How samples come from storage.

    Attributes:
        timeout_s: Seconds after which a read counts as stalled.
        attempts: Times a read that stalled or failed is tried before its sample is quarantined.
        prefetch: Packs that each worker builds ahead.
    """

    timeout_s: float = 60.0
    attempts: int = 3
    prefetch: int = 2


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """How far samples travel from their place in the shards; reads stay near each other in exchange.

    Attributes:
        block_mib: Neighbouring samples of about this size stay in one block; blocks come in a keyed order.
        blocks: Samples are mixed over this many consecutive blocks.
    """

    block_mib: float = 32.0
    blocks: int = 64


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Blend, packing and media rules of one run.

    Attributes:
        sources: Blend, by dataset name.
        tokenizer: Folder that holds `tokenizer.json`.
        seq_length: Tokens of a pack.
        packing: `bfd` (best fit decreasing: the fullest packs), `balanced` (every pack holds long and short samples, as
            in the paper), `sequential`, or `none` (one sample a pack).
        window_samples: About how many samples are packed together. Windows are independent and have equally many
            packs, so that any pack is found at once.
        template: Named version of the prompt rules.
        tile_size: Side of a tile in pixels.
        max_tiles: Largest grid of one image, thumbnail not counted.
        use_thumbnail: Append one tile with the whole image when the grid has more than one tile.
        video_fps: Frames sampled per second of video.
        max_frames: Most frames of one video.
        video_pruning_rate: Share of each video's visual tokens that never reach the language model (Efficient Video
            Sampling, arXiv 2510.14624), in [0, 1); which ones, the model finds by its features.
        num_workers: Processes that build packs ahead; 0 builds them in the training process.
        document_bucket: The number of documents of a pack is rounded up to a multiple of this.
        max_seqlen_bucket: `max_seqlen` is rounded up to a multiple of this.
        loss: Weight of each supervised token.
        cost: What makes packs alike.
        read: Time-outs and prefetch.
        shuffle: Blocks of the keyed order.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = ""
    seq_length: int = 16384
    packing: str = "bfd"
    window_samples: int = 16384
    template: str = "nano_v2_vl"
    tile_size: int = 512
    max_tiles: int = 12
    use_thumbnail: bool = True
    video_fps: float = 2.0
    max_frames: int = 128
    video_pruning_rate: float = 0.0
    num_workers: int = 0
    document_bucket: int = 8
    max_seqlen_bucket: int = 128
    loss: LossWeightConfig = field(default_factory=LossWeightConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
