"""What the data side needs to know about a run. Plain dataclasses: importable without torch."""

from dataclasses import dataclass, field

PACKING_MODES = ("bfd", "sequential", "none")
LOSS_MODES = ("token", "sample", "square")
LOSS_UNITS = ("sample", "turn")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset folder of a blend.

    Attributes:
        path: Dataset folder (shards and manifest), as written by `nemovl data`.
        split: Name of the split inside the folder.
        weight: Share of the blend in samples, relative to the other sources.
        max_samples: Use only the first samples of the split's order; all when None.
    """

    path: str
    split: str = "train"
    weight: float = 1.0
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
class DataConfig:
    """Blend, packing and media rules of one run.

    Attributes:
        sources: Blend, by dataset name.
        tokenizer: Folder that holds `tokenizer.json`.
        seq_length: Tokens of a pack.
        packing: `bfd` (best fit decreasing), `sequential`, or `none` (one sample a pack).
        window_samples: Samples that are packed together; windows are independent, so a position is (window, pack).
        template: Named version of the prompt rules.
        tile_size: Side of a tile in pixels.
        max_tiles: Largest grid of one image, thumbnail not counted.
        use_thumbnail: Append one tile with the whole image when the grid has more than one tile.
        video_fps: Frames sampled per second of video.
        max_frames: Most frames of one video.
        num_workers: Processes that build packs ahead; 0 builds them in the training process.
        document_bucket: The number of documents of a pack is rounded up to a multiple of this.
        max_seqlen_bucket: `max_seqlen` is rounded up to a multiple of this.
        loss: Weight of each supervised token.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = ""
    seq_length: int = 16384
    packing: str = "bfd"
    window_samples: int = 4096
    template: str = "nano_v2_vl"
    tile_size: int = 512
    max_tiles: int = 12
    use_thumbnail: bool = True
    video_fps: float = 2.0
    max_frames: int = 128
    num_workers: int = 0
    document_bucket: int = 8
    max_seqlen_bucket: int = 128
    loss: LossWeightConfig = field(default_factory=LossWeightConfig)
