"""Frames out of videos and pages out of PDFs, and what an import makes of them."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import sample_frames
from data_pipelines.media.video import probe, video_tiles
from data_pipelines.prepare import extract_frames, reduced_video, render_pdfs


@pytest.mark.parametrize(
    ("frames", "fps", "limit", "kept"),
    [
        (40, 10, 128, [0, 5, 10, 15, 20, 25, 30, 35]),
        (20, 10, 128, [0, 2, 5, 7, 10, 12, 15, 17]),
        (100, 10, 4, [0, 25, 50, 75]),
        (5, 10, 128, [0, 1, 2, 3, 4]),
    ],
)
def test_a_reduced_video_holds_the_frames_that_training_takes(clip, frames, fps, limit, kept):
    data, count = reduced_video(clip(frames, fps), fps=2.0, max_frames=limit, side=512)
    shape = probe(data)
    assert (shape.frames, count) == (len(kept), len(kept))
    # Training takes every frame of the copy, and each shows what the original showed there (brightness 2 i).
    indices = sample_frames(shape.frames, shape.fps, target_fps=2.0, max_frames=limit)
    assert indices == tuple(range(len(kept)))
    seen = video_tiles(data, indices, 64).float().mean(dim=(1, 2, 3)).numpy()
    assert np.abs(seen - 2 * np.array(kept)).max() < 6
    # A frame's time in the copy is its time in the original.
    times = np.arange(len(kept)) / shape.fps
    assert np.abs(times - np.array(kept) / fps).max() <= 1 / fps


def test_the_same_video_gives_the_same_bytes_and_fewer_pixels(clip):
    first, second = (reduced_video(clip(40, 10, side=96), fps=2.0, max_frames=8, side=48)[0] for _ in range(2))
    assert first == second
    assert (probe(first).width, probe(first).height) == (48, 48)


def test_a_folder_keeps_its_names(tmp_path, clip):
    (tmp_path / "src/a").mkdir(parents=True)
    (tmp_path / "src/a/v.mp4").write_bytes(clip(40, 10))
    (tmp_path / "src/a/bad.mp4").write_bytes(b"no video")
    (tmp_path / "src/metadata.jsonl").write_text("{}\n")
    result = extract_frames(tmp_path / "src", tmp_path / "out", fps=2.0, max_frames=128, side=512)
    assert (result["videos"], result["frames"], [f["file"] for f in result["failed"]]) == (1, 8, ["a/bad.mp4"])
    assert probe((tmp_path / "out/a/v.mp4").read_bytes()).frames == 8
    assert (tmp_path / "out/metadata.jsonl").read_text() == "{}\n"
    with pytest.raises(DataError, match="exists already"):
        extract_frames(tmp_path / "src", tmp_path / "out", fps=2.0, max_frames=128, side=512)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no videos"):
        extract_frames(tmp_path / "none", tmp_path / "out2", fps=2.0, max_frames=128, side=512)


def test_rendered_pages_come_with_their_text(tmp_path):
    (tmp_path / "src/x").mkdir(parents=True)
    figure = Figure(figsize=(4, 3))
    figure.text(0.1, 0.5, "Grand total 12.40")
    figure.savefig(tmp_path / "src/x/a.pdf")
    (tmp_path / "src/bad.pdf").write_bytes(b"no pdf")
    result = render_pdfs(tmp_path / "src", tmp_path / "out", dpi=72)
    assert (result["documents"], result["pages"], [f["file"] for f in result["failed"]]) == (1, 1, ["bad.pdf"])
    (line,) = (json.loads(text) for text in (tmp_path / "out/metadata.jsonl").read_text().splitlines())
    assert line == {"file_name": "x/a/00001.png", "text": "Grand total 12.40"}
    assert (tmp_path / "out/x/a/00001.png").exists()
