"""The tower against Transformers' `RadioModel` on the same weights, the pixel shuffle against its published form."""

from dataclasses import replace

import pytest
import torch
from hf_oracle import canonical_gradients, copy_weights, relative_difference, tiny_radio
from tiny import TINY
from torch import Tensor

from nemovl_train.config.schema import ModelConfig
from nemovl_train.model.backend import select_backend
from nemovl_train.model.vision import VisionTower, build_vision_tower, pixel_shuffle
from nemovl_train.parallel.layout import Layout

BOUND = 1e-4


def build(config: ModelConfig, layout: Layout) -> VisionTower:
    """A tower in training mode whose every tensor matters: norms away from 1, biases and prefix away from 0."""
    tower = build_vision_tower(config.vision, layout, torch.float32, select_backend("torch"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tower.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "layernorm.weight" in name else 0.3 * noise
    return tower.train()


def random_tiles(count: int, config: ModelConfig) -> Tensor:
    side = config.vision.tile_size
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def canonical(tower: VisionTower) -> dict[str, Tensor]:
    return {f"vision_model.{name}": parameter.detach() for name, parameter in tower.named_parameters()}


# Traps that this comparison has to avoid, each of which makes right code look wrong or wrong code look right:
# - GELU: megatron-core's fast form is tanh, the published code's is exact. Both are run, each against its twin; the
#   crossed case must fail, or the test could not tell them apart.
# - The learned grid is larger than the tile's, so that the resize takes part; equal grids would skip it.
# - Training mode: megatron-core would crop the grid at random there, `RadioModel` never does. Ours must not.
# - The key bias has a gradient of zero by construction (a shift of all scores of a query), so a relative comparison of
#   it alone compares rounding errors. The fused q, k, v bias is compared instead, by norm.
# - Transformers hands the prefix tokens back too; only the patch features are compared.
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_same_features_and_gradients_as_transformers(layout, activation):
    config = replace(TINY, vision=replace(TINY.vision, activation=activation))
    tower, native = build(config, layout), tiny_radio(config.vision)
    copy_weights(canonical(tower), config, "vision", native)
    tiles = random_tiles(3, config)

    ours = tower.encode(tiles)
    # `RadioModel` normalises pixels in [0, 1] itself, with the statistics of its config.
    theirs = published_pixel_shuffle(native(tiles.float() / 255).features)
    assert relative_difference(ours, theirs) < BOUND

    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * probe).sum().backward()
    (theirs * probe).sum().backward()
    expected = canonical_gradients(native, config, "vision")
    worst = {
        name: relative_difference(parameter.grad, expected[f"vision_model.{name}"])
        for name, parameter in tower.named_parameters()
    }
    assert len(worst) == len(expected)
    assert max(worst.values()) < BOUND, max(worst, key=worst.__getitem__)


def test_the_two_gelus_can_be_told_apart(layout):
    tower = build(TINY, layout)
    native = tiny_radio(replace(TINY.vision, activation="gelu_tanh"))
    copy_weights(canonical(tower), TINY, "vision", native)
    tiles = random_tiles(2, TINY)
    assert (
        relative_difference(tower.encode(tiles), published_pixel_shuffle(native(tiles.float() / 255).features)) > BOUND
    )


def test_parameter_names_do_not_show_fused_norms_or_a_final_norm(layout):
    names = {name for name, _ in build(TINY, layout).named_parameters()}
    assert "decoder.layers.0.input_layernorm.bias" in names
    assert "decoder.layers.2.pre_mlp_layernorm.weight" in names
    assert not [name for name in names if "final" in name]
    assert set(build(TINY, layout).state_dict(keep_vars=True)) - names == {
        name for name in build(TINY, layout).state_dict() if name.endswith("_extra_state")
    }


def test_training_mode_takes_no_random_crop_and_chunks_do_not_matter(layout):
    tower, tiles = build(TINY, layout), random_tiles(5, TINY)
    whole = tower.encode(tiles)
    assert torch.equal(whole, tower.encode(tiles))
    tower.max_tiles_per_chunk = 2
    assert relative_difference(tower.encode(tiles), whole) < 1e-6
    assert tower.encode(tiles[:0]).shape == (0, 4, 4 * TINY.vision.hidden_size)


def test_pixel_shuffle_joins_squares_in_row_order():
    # Feature (row, column, channel) holds the number 100 row + 10 column + channel: the result can be read off.
    grid = 100 * torch.arange(4)[:, None, None] + 10 * torch.arange(4)[:, None] + torch.arange(2)
    tokens = pixel_shuffle(grid.reshape(1, 16, 2))
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    assert tokens[0, 1].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]
    assert tokens[0, 2].tolist() == [200, 201, 210, 211, 300, 301, 310, 311]


def test_pixel_shuffle_equals_the_published_form():
    features = torch.randn(2, 36, 5)
    features = torch.cat([features, features], dim=-1)
    assert torch.equal(pixel_shuffle(features), published_pixel_shuffle(features))


def published_pixel_shuffle(features: Tensor) -> Tensor:
    """The two views and transposes of the released model's code (`ps_version` v2), on [T, G * G, D]."""
    tiles, patches, width = features.shape
    side = int(patches**0.5)
    x = features.reshape(tiles, side, side, width).view(tiles, side, side // 2, 2 * width)
    x = x.permute(0, 2, 1, 3).contiguous().view(tiles, side // 2, side // 2, 4 * width)
    return x.permute(0, 2, 1, 3).reshape(tiles, patches // 4, 4 * width)
