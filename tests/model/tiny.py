"""A model of every kind of layer and packs for it, small enough for a laptop's test."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from data_pipelines.schema import Pack
from nemovl_train.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, TokenIds, VisionConfig

VOCABULARY = 256

TINY = ModelConfig(
    name="tiny",
    language=LanguageConfig(
        hidden_size=64,
        hybrid_pattern="M-M*-",
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        ffn_hidden_size=128,
        mamba_num_heads=8,
        mamba_head_dim=16,
        mamba_state_dim=16,
        mamba_num_groups=2,
        chunk_size=32,
        vocab_size=VOCABULARY + 16,
        base_vocab_size=VOCABULARY,
    ),
    # Tiles of 4 x 4 patches on a learned grid of 16 x 16: the grid has to be resized, as in the released model.
    vision=VisionConfig(
        num_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        ffn_hidden_size=96,
        tile_size=64,
        max_resolution=256,
        prefix_tokens=6,
    ),
    projector=ProjectorConfig(ffn_hidden_size=160),
    tokens=TokenIds(image=VOCABULARY, image_start=VOCABULARY + 1, image_end=VOCABULARY + 2, video=VOCABULARY + 9),
)

ONE_PROCESS = SimpleNamespace(device=torch.device("cpu"), context_tokens=range, pack_rank=0, pack_ranks=1)
"""What a batch asks of a layout, for batches that no process shares."""


@dataclass(frozen=True)
class Sample:
    """Token ids with image tokens already in place, and the tiles they stand for."""

    ids: Tensor
    tiles: Tensor

    @classmethod
    def random(cls, seed: int, *, text: tuple[int, ...], tiles: tuple[int, ...] = ()) -> "Sample":
        """Runs of random text with images between them: `text` has one entry more than `tiles`.

        Args:
            seed: Seed of ids and pixels.
            text: Lengths of the runs of text.
            tiles: Number of tiles of each image.
        """
        generator = torch.Generator().manual_seed(seed)
        side, image = TINY.vision.tile_size, TINY.tokens.image
        runs = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in text]
        ids = [runs[0]]
        for count, run in zip(tiles, runs[1:], strict=True):
            ids += [torch.full((count * TINY.tokens_per_tile,), image), run]
        pixels = torch.randint(0, 256, (sum(tiles), 3, side, side), dtype=torch.uint8, generator=generator)
        return cls(torch.cat(ids), pixels)


def make_pack(samples: Sequence[Sample], seq_length: int) -> Pack:
    """Pack samples one after another; the rest is a padding document. Every text token after the first is a target."""
    ids = torch.full((seq_length,), TINY.tokens.pad)
    labels = torch.full((seq_length,), -100)
    seq_idx = torch.full((seq_length,), len(samples), dtype=torch.int32)
    bounds, starts = [0], []
    for number, sample in enumerate(samples):
        begin, end = bounds[-1], bounds[-1] + len(sample.ids)
        ids[begin:end] = sample.ids
        labels[begin : end - 1] = sample.ids[1:].masked_fill(sample.ids[1:] == TINY.tokens.image, -100)
        seq_idx[begin:end] = number
        images = (sample.ids == TINY.tokens.image).nonzero()[:, 0] + begin
        starts += images[:: TINY.tokens_per_tile].tolist()
        bounds.append(end)
    bounds += [seq_length] * (bounds[-1] < seq_length)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    tiles = torch.cat([sample.tiles for sample in samples])
    return Pack(
        index=0,
        input_ids=ids,
        labels=labels,
        loss_weight=(labels >= 0).float(),
        position_ids=torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()]),
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        tiles=tiles,
        tile_token_start=torch.tensor(starts, dtype=torch.int64),
        media_of_tile=torch.zeros(len(tiles), dtype=torch.int32),
        is_thumbnail=torch.zeros(len(tiles), dtype=torch.bool),
        frame_time=torch.full((len(tiles),), float("nan")),
        sample_keys=tuple(f"sample-{number}" for number in range(len(samples))),
        dataset_ids=("test",) * len(samples),
        stats={},
    )
