"""The input on which an exported folder is compared with our model: text alone, and text around two tiles.

Shape legend: S tokens of a text, T tiles (2), P tile side in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemovl_train.config.schema import ModelConfig

SEED = 20251
TEXT_TOKENS = 24
TILES = 2


@dataclass(frozen=True)
class Probe:
    """Deterministic inputs.

    Attributes:
        text: [S] int64 ids of the text vocabulary.
        mixed: [S + T * tokens_per_tile + 2] int64, the same text with two tiles in its middle.
        tiles: [T, 3, P, P] uint8.
        tile_start: [T] int64, position in `mixed` of each tile's first image token.
    """

    text: Tensor
    mixed: Tensor
    tiles: Tensor
    tile_start: Tensor


def make_probe(config: ModelConfig) -> Probe:
    """The probe of a model. Tiles are gradients with noise: every patch differs, none saturates."""
    generator = torch.Generator().manual_seed(SEED)
    tokens, side = config.tokens, config.vision.tile_size
    text = torch.randint(0, config.language.base_vocab_size, (TEXT_TOKENS,), generator=generator)
    half, per_tile = TEXT_TOKENS // 2, config.tokens_per_tile
    image = torch.tensor([tokens.image_start] + [tokens.image] * (TILES * per_tile) + [tokens.image_end])
    ramp = torch.linspace(0, 160, side)[None, None, :, None] + torch.linspace(0, 60, side)[None, None, None, :]
    noise = torch.randint(0, 36, (TILES, 3, side, side), generator=generator)
    return Probe(
        text=text,
        mixed=torch.cat([text[:half], image, text[half:]]),
        tiles=(ramp + noise).to(torch.uint8),
        tile_start=half + 1 + per_tile * torch.arange(TILES),
    )
