import io

import av
import numpy as np
import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.media import video as video_module
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


def test_a_playlist_cannot_make_the_decoder_open_another_file(tmp_path, monkeypatch, clip):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.mp4").write_bytes(clip(10))
    playlist = b"ffconcat version 1.0\nfile own.mp4\n"
    with av.open(io.BytesIO(playlist)) as container:  # FFmpeg would
        assert sum(1 for _ in container.decode(video=0)) == 10
    with pytest.raises(DataError, match="video cannot be opened"):
        probe(playlist)


def test_a_frame_too_large_is_refused_before_it_is_decoded(monkeypatch, clip):
    data = clip(4, side=64)
    assert probe(data).width == 64
    monkeypatch.setattr(video_module, "MAX_PIXELS", 63 * 64)
    monkeypatch.setattr(video_module, "_decoded", None)
    with pytest.raises(DataError, match="video of 64x64 pixels is larger"):
        probe(data)


def test_caps_on_bytes_and_frames(monkeypatch, clip):
    data = clip(12)
    monkeypatch.setattr(video_module, "MAX_VIDEO_FRAMES", 11)
    with pytest.raises(DataError, match="more than 11 frames"):
        probe(data)
    monkeypatch.setattr(video_module, "MAX_VIDEO_BYTES", len(data) - 1)
    with pytest.raises(DataError, match="larger than"):
        probe(data)


def test_a_transport_stream_has_a_rate():
    out = io.BytesIO()
    with av.open(out, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    shape = probe(out.getvalue())
    assert (shape.frames, shape.fps) == (20, 10.0)


def h264(frames, **options):
    """A clip whose frames differ everywhere, with B-pictures that refer to each other unless options say otherwise."""
    out = io.BytesIO()
    draw = np.random.default_rng(0).integers(0, 255, (80, 400, 3), dtype=np.uint8)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", **options})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(draw[i % 9 : 64 + i % 9, 3 * i : 96 + 3 * i]), "rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"bf": "0"}, {"g": "10", "x264-params": "open-gop=1"}, {"bf": "5", "b_strategy": "0"}]
)
@pytest.mark.parametrize("indices", [(0, 15, 30, 45, 60, 75), (7,), (1, 1, 2, 89, 89), tuple(range(90)), (88, 89)])
def test_frames_are_the_same_when_others_are_not_decoded(options, indices):
    data = h264(90, **options)
    every = [frame.to_ndarray(format="rgb24") for frame in video_module.decoded_frames(data, range(90))]
    assert len({frame.tobytes() for frame in every}) == 90
    few = [frame.to_ndarray(format="rgb24") for frame in video_module.decoded_frames(data, indices, 90)]
    assert len(few) == len(indices)
    assert all((frame == every[index]).all() for frame, index in zip(few, indices, strict=True))


def test_pictures_that_nobody_needs_are_not_decoded(monkeypatch):
    data = h264(90, bf="5", b_strategy="0")
    with video_module._container(data) as container:
        needed = list(video_module._decoded(container, container.streams.video[0], {0}))
    assert len(needed) < 60
    # Another count than the packets': their stamps do not say which frame is which, so all are decoded.
    assert video_module._stamps(data, 89) == []
    assert len(video_module._stamps(data, 90)) == 90


def test_a_short_h264_clip_is_refused_too():
    with pytest.raises(DataError, match="ends after 1 of the 2 frames"):
        video_tiles(h264(20), (3, 30), 64, 20)
