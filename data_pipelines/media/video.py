"""Videos to frames, one tile each, with PyAV (imported on first use: only video data needs it).

Shape legend: T frames, P tile side.
"""

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from data_pipelines.exceptions import DataError
from data_pipelines.media.image import MAX_PIXELS, resize
from data_pipelines.media.rules import MediaShape

MAX_VIDEO_BYTES = 2**30
"""Largest video file read: it is held in memory while it is decoded."""
MAX_VIDEO_FRAMES = 2**20
"""Most frames of a video: nearly ten hours at 30 a second."""
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
"""Demuxers that read the file itself. FFmpeg's playlist and image-sequence readers open other files and URLs."""
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}

MAX_FPS = 1000.0
"""Time stamps count whole milliseconds a frame, so a faster clip has none."""


def check_rate(fps: float, frames: int) -> None:
    """Refuse a rate or count that no frame can be chosen by.

    Raises:
        DataError: `fps` not in (0, 1000], or no frames.
    """
    if not (math.isfinite(fps) and 0 < fps <= MAX_FPS and frames > 0):
        raise DataError(f"video with {frames} frames at {fps} frames per second cannot be sampled")


def probe(data: bytes) -> MediaShape:
    """Size, rate and number of frames; frames are counted by decoding, since headers are often wrong.

    Raises:
        DataError: No decodable video stream.
    """
    with _container(data) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 0)  # a transport stream states none
        frames = 0
        for _ in _decoded(container, stream):
            frames += 1
            if frames > MAX_VIDEO_FRAMES:
                raise DataError(f"video has more than {MAX_VIDEO_FRAMES} frames; cut it")
        check_rate(fps, frames)
        return MediaShape("video", stream.codec_context.width, stream.codec_context.height, fps, frames)


def video_tiles(data: bytes, indices: Sequence[int], tile_size: int) -> torch.Tensor:
    """Decode the frames `indices` (rising), each resized to one tile without keeping its aspect ratio.

    Returns:
        [T, 3, P, P] uint8.

    Raises:
        DataError: The stream is damaged or ends before the last frame asked for.
    """
    tiles = []
    for frame in decoded_frames(data, indices):
        pixels = np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
        tiles.append(resize(torch.from_numpy(pixels), tile_size, tile_size))
    return torch.stack(tiles)


def decoded_frames(data: bytes, indices: Sequence[int]) -> Iterator[Any]:
    """PyAV's frames of some numbers (rising; a number may repeat).

    Raises:
        DataError: The stream is damaged or ends before the last frame asked for.
    """
    wanted = iter(indices)
    target: int | None = next(wanted, None)
    given = 0
    with _container(data) as container:
        for number, frame in enumerate(_decoded(container, container.streams.video[0])):
            while target == number:
                yield frame
                given += 1
                target = next(wanted, None)
            if target is None:
                return
    raise DataError(f"video ends after {given} of the {len(indices)} frames that its metadata promise")


def _container(data: bytes) -> Any:
    import av

    if len(data) > MAX_VIDEO_BYTES:
        raise DataError(f"video file of {len(data)} bytes is larger than {MAX_VIDEO_BYTES} bytes; cut it")
    try:
        container = av.open(io.BytesIO(data), mode="r", options=_OPEN_OPTIONS)
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"video cannot be opened: {error}") from error
    problem = _size_problem(container)
    if problem:
        container.close()
        raise DataError(problem)
    return container


def _size_problem(container: Any) -> str:
    """Why the stream is not decoded at all; empty when it may be."""
    if not container.streams.video:
        return "file has no video stream"
    context = container.streams.video[0].codec_context
    if context.width * context.height > MAX_PIXELS:
        return f"video of {context.width}x{context.height} pixels is larger than {MAX_PIXELS} pixels"
    # A stream may change its size on the way: the decoder itself refuses what is above.
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return ""


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    import av

    stream.thread_count = 1  # workers are the parallelism; more threads in each only fight for the cores
    try:
        yield from container.decode(stream)
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"video is damaged: {error}") from error
