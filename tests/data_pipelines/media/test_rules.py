import itertools
import random

import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import (
    MediaShape,
    RenderRules,
    choose_grid,
    frame_time,
    lay_out,
    sample_frames,
    smaller_budgets,
)


def rules(**options):
    settings = {"template": "nano_v2_vl", "tile_size": 512, "max_tiles": 12, "use_thumbnail": True}
    return RenderRules(**{**settings, "video_fps": 2.0, "max_frames": 128, **options})


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((512, 512), (1, 1)),
        ((1024, 1024), (2, 2)),
        ((640, 480), (4, 3)),
        ((2048, 1536), (4, 3)),
        ((1920, 1080), (4, 2)),
        ((481, 202), (5, 2)),
        ((1178, 1779), (2, 3)),
    ],
)
def test_golden_grids_of_the_released_processor(size, grid):
    assert choose_grid(*size, 12, 512) == grid


def test_grids_are_those_of_an_independent_implementation():
    """Transformers' own form of InternVL's rule, over random sizes and over all on which several grids tie."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    draw = random.Random(3)
    sizes = [(draw.randint(1, 5000), draw.randint(1, 5000)) for _ in range(1500)]
    grids = itertools.product(range(1, 7), repeat=2)
    sizes += [(c * side, r * side) for c, r in grids for side in (90, 200, 256, 362, 363, 512, 700, 1024)]
    for most in (1, 2, 4, 6, 8, 12):
        for width, height in sizes:
            theirs = get_optimal_tiled_canvas((height, width), (512, 512), 1, most)
            assert choose_grid(width, height, most, 512) == theirs, (width, height, most)


@pytest.mark.parametrize(("max_tiles", "tiles"), [(2, 3), (4, 3), (8, 3), (12, 11)])
def test_golden_tile_counts_with_smaller_budgets(max_tiles, tiles):
    layout = lay_out(MediaShape("image", 481, 202), rules(), max_tiles=max_tiles, max_frames=1)
    assert layout.tiles == tiles


def test_grid_scales_with_the_tile():
    for size in [(512, 512), (1024, 1024), (640, 480), (1178, 1779)]:
        small = (size[0] / 8, size[1] / 8)
        assert choose_grid(*small, 12, 64) == choose_grid(*size, 12, 512)


def test_thumbnail_only_beside_several_tiles():
    assert not lay_out(MediaShape("image", 512, 512), rules(), max_tiles=12, max_frames=1).thumbnail
    assert lay_out(MediaShape("image", 1024, 1024), rules(), max_tiles=12, max_frames=1).thumbnail
    none = lay_out(MediaShape("image", 1024, 1024), rules(use_thumbnail=False), max_tiles=12, max_frames=1)
    assert none.tiles == 4


def test_tokens_per_tile():
    assert rules().tokens_per_tile == 256
    assert rules(tile_size=64).tokens_per_tile == 4
    with pytest.raises(DataError, match="multiple of 32"):
        rules(tile_size=100)


def test_two_frames_a_second():
    indices = sample_frames(300, 30.0, target_fps=2.0, max_frames=128)
    assert indices == tuple(range(0, 300, 15))
    assert [frame_time(i, 30.0) for i in indices[:3]] == [0.0, 0.495, 0.99]


def test_long_clips_are_covered_uniformly():
    indices = sample_frames(30 * 600, 30.0, target_fps=2.0, max_frames=128)
    gaps = {b - a for a, b in itertools.pairwise(indices)}
    assert len(indices) == 128
    assert gaps <= {140, 141}
    assert indices[0] == 70


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 15, 31, 1000])
@pytest.mark.parametrize("fps", [1.0, 2.0, 23.976, 60.0])
@pytest.mark.parametrize("most", [1, 8, 128])
def test_frames_are_rising_and_in_range(frames, fps, most):
    indices = sample_frames(frames, fps, target_fps=2.0, max_frames=most)
    assert 1 <= len(indices) <= min(most, frames)
    assert list(indices) == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < frames
    if frames >= 8 and most >= 8:
        assert len(indices) >= 8


def test_budgets_fall_tiles_first():
    assert smaller_budgets(rules(max_frames=8)) == [
        (8, 8), (6, 8), (4, 8), (2, 8), (1, 8), (1, 4), (1, 2), (1, 1),
    ]  # fmt: skip
