import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import MediaShape
from data_pipelines.media.video import check_rate, probe, video_tiles


def test_probe_counts_frames(clip):
    assert probe(clip(40, 10)) == MediaShape("video", 32, 32, 10.0, 40)


def test_the_right_frames_come_back_as_tiles(clip):
    tiles = video_tiles(clip(40, 10), (0, 13, 39), 64)
    assert tiles.shape == (3, 3, 64, 64)
    for tile, frame in zip(tiles, (0, 13, 39), strict=True):
        assert abs(float(tile.float().mean()) - 2 * frame) < 6


def test_a_clip_that_ends_early_is_refused(clip):
    with pytest.raises(DataError, match="ends after 1 of the 2 frames"):
        video_tiles(clip(10, 10), (0, 30), 64)


def test_no_video_is_refused(clip, picture):
    with pytest.raises(DataError):
        probe(b"nothing")
    data = clip(40, 10)
    with pytest.raises(DataError):
        video_tiles(data[:200], (0, 39), 64)
    for fps, frames in ((0.0, 5), (float("nan"), 5), (10.0, 0), (5000.0, 5)):
        with pytest.raises(DataError, match="cannot be sampled"):
            check_rate(fps, frames)
