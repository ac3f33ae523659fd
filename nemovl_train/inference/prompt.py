"""From a question and its media to the tokens and tiles that the model answers from.

Shape suffixes: S tokens, T tiles, P tile side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.manifest import media_shape
from data_pipelines.media.rules import RenderRules, lay_out
from data_pipelines.pack import media_tiles
from data_pipelines.schema import IGNORE_LABEL, Pack, media_items
from data_pipelines.template import encode_prompt
from data_pipelines.tokenizer import TextTokenizer

LENGTH_BUCKET = 64
"""Pack lengths are rounded up to a multiple of this, so that kernels meet few distinct shapes."""


@dataclass(frozen=True)
class Prompt:
    """One question, rendered up to where the model answers.

    Attributes:
        input_ids: Ids so far; generated ones are appended.
        tiles: [T, 3, P, P] uint8.
        tile_start: Position of the first image token of each tile.
    """

    input_ids: tuple[int, ...]
    tiles: Tensor
    tile_start: tuple[int, ...]

    def extended(self, token: int) -> Prompt:
        """The prompt with one more token."""
        return replace(self, input_ids=(*self.input_ids, token))


def build_prompt(
    record: Mapping[str, Any], media: Mapping[str, bytes], tokenizer: TextTokenizer, rules: RenderRules
) -> Prompt:
    """Render a record; its last answer, if it has one, is left out.

    Args:
        record: A record of the dataset schema.
        media: Bytes of its media, by member name.
        tokenizer: Text tokenizer.
        rules: Tiling and frame rules.

    Raises:
        DataError: The record or one of its media cannot be used.
    """
    items = list(media_items(record))
    shapes = [media_shape(item, media[item.member]) for item in items]
    layouts = [lay_out(s, rules, max_tiles=rules.max_tiles, max_frames=rules.max_frames) for s in shapes]
    encoded = encode_prompt(record, layouts, tokenizer, tokens_per_tile=rules.tokens_per_tile)
    by_medium = media_tiles(items, shapes, layouts, media, rules)
    # Text may place media in another order than the record lists them; tiles follow the text.
    placed = [by_medium[number] for number in dict.fromkeys(encoded.media_of_tile.tolist())]
    empty = torch.empty((0, 3, rules.tile_size, rules.tile_size), dtype=torch.uint8)
    return Prompt(tuple(encoded.input_ids.tolist()), torch.cat([empty, *placed]), tuple(encoded.tile_start.tolist()))


def pack_prompts(prompts: Sequence[Prompt], *, pad: int, ranks: int = 1) -> tuple[Pack, Tensor]:
    """Several prompts in one sequence, each a document of its own.

    Args:
        prompts: Prompts to answer together.
        pad: Id that fills the tail.
        ranks: Ranks that will share its tokens.

    Returns:
        The pack, and for each prompt the position of its last token, [len(prompts)] int64.
    """
    lengths = np.array([len(prompt.input_ids) for prompt in prompts])
    ends = lengths.cumsum()
    used = int(ends[-1])
    # Equal shares, none shorter than a convolution's reach.
    unit = math.lcm(LENGTH_BUCKET, 4 * ranks)
    size = -(-used // unit) * unit
    documents = [*lengths.tolist(), size - used] if size > used else lengths.tolist()
    ids = np.full(size, pad, dtype=np.int64)
    ids[:used] = np.concatenate([prompt.input_ids for prompt in prompts])
    starts = ends - lengths
    tile_start = [
        int(start) + place for start, prompt in zip(starts, prompts, strict=True) for place in prompt.tile_start
    ]
    tiles = torch.cat([prompt.tiles for prompt in prompts])
    pack = Pack(
        index=-1,
        input_ids=torch.from_numpy(ids),
        labels=torch.full((size,), IGNORE_LABEL),
        loss_weight=torch.zeros(size),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in documents])),
        seq_idx=torch.from_numpy(np.repeat(np.arange(len(documents), dtype=np.int32), documents)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(documents)]).astype(np.int32)),
        max_seqlen=max(documents),
        tiles=tiles,
        tile_token_start=torch.tensor(tile_start, dtype=torch.int64),
        media_of_tile=torch.zeros(tiles.shape[0], dtype=torch.int32),
        is_thumbnail=torch.zeros(tiles.shape[0], dtype=torch.bool),
        frame_time=torch.full((tiles.shape[0],), float("nan")),
        sample_keys=tuple(f"prompt{i}" for i in range(len(prompts))),
        dataset_ids=("prompt",) * len(prompts),
        stats={"tokens": used, "supervised_tokens": 0, "visual_tokens": 0, "padding": size - used},
    )
    return pack, torch.from_numpy(ends - 1)
