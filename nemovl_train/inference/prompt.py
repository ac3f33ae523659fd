"""From a question and its media to the tokens and tiles that the model answers from.

Shape suffixes: S tokens, T tiles, P tile side in pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data_pipelines.manifest import media_shape
from data_pipelines.media.rules import RenderRules, lay_out
from data_pipelines.pack import media_tiles
from data_pipelines.schema import media_items
from data_pipelines.template import encode_prompt
from data_pipelines.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Prompt:
    """One question, rendered up to where the model answers.

    Attributes:
        input_ids: Ids, one image token for each visual feature.
        tiles: [T, 3, P, P] uint8, in the order of their tokens.
        tile_start: Position of the first image token of each tile.
        videos: Tiles of each video, its frames.
    """

    input_ids: tuple[int, ...]
    tiles: Tensor
    tile_start: tuple[int, ...]
    videos: tuple[range, ...] = ()

    @cached_property
    def identity(self) -> str:
        """Hash of what is asked, pixels included."""
        sha = hashlib.sha256(json.dumps(self.input_ids).encode())
        sha.update(self.tiles.contiguous().numpy().tobytes())
        return sha.hexdigest()


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
    # What is dropped of a video is dropped once its features are known.
    rules = replace(rules, video_pruning_rate=0.0)
    layouts = [lay_out(s, rules, max_tiles=rules.max_tiles, max_frames=rules.max_frames) for s in shapes]
    encoded = encode_prompt(record, layouts, tokenizer, tokens_per_tile=rules.tokens_per_tile)
    by_medium = media_tiles(items, shapes, layouts, media, rules)
    # Text may place media in another order than the record lists them; tiles follow the text.
    placed = [by_medium[number] for number in dict.fromkeys(encoded.media_of_tile.tolist())]
    empty = torch.empty((0, 3, rules.tile_size, rules.tile_size), dtype=torch.uint8)
    videos, tiles = [], 0
    for number in dict.fromkeys(encoded.media_of_tile.tolist()):
        if layouts[number].kind == "video":
            videos.append(range(tiles, tiles + layouts[number].tiles))
        tiles += layouts[number].tiles
    return Prompt(
        input_ids=tuple(encoded.input_ids.tolist()),
        tiles=torch.cat([empty, *placed]),
        tile_start=tuple(encoded.tile_start.tolist()),
        videos=tuple(videos),
    )
