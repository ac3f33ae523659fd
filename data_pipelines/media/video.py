"""Videos to frames, one tile each, with PyAV (imported on first use: only video data needs it).

Shape legend: T frames, P tile side.
"""

import io
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
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


def video_tiles(data: bytes, indices: Sequence[int], tile_size: int, frames: int | None = None) -> torch.Tensor:
    """Decode the frames `indices` (rising), each resized to one tile without keeping its aspect ratio.

    Args:
        data: Bytes of the video.
        indices: Numbers of frames, from 0.
        tile_size: P.
        frames: Frames of the video where that is known, which saves decoding some that are not asked for.

    Returns:
        [T, 3, P, P] uint8.

    Raises:
        DataError: The stream is damaged or ends before the last frame asked for.
    """
    tiles = []
    for frame in decoded_frames(data, indices, frames):
        pixels = np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
        tiles.append(resize(torch.from_numpy(pixels), tile_size, tile_size))
    return torch.stack(tiles)


def decoded_frames(data: bytes, indices: Sequence[int], frames: int | None = None) -> Iterator[Any]:
    """PyAV's frames of some numbers (rising; a number may repeat).

    Args:
        data: Bytes of the video.
        indices: Numbers of frames, from 0.
        frames: Frames of the video where that is known.

    Raises:
        DataError: The stream is damaged or ends before the last frame asked for.
    """
    wanted = Counter(indices)
    given = 0
    stamps = _stamps(data, frames)
    numbers = {stamp: number for number, stamp in enumerate(stamps)}
    with _container(data) as container:
        stream = container.streams.video[0]
        needed = {stamps[index] for index in wanted if index < len(stamps)} if stamps else None
        for position, frame in enumerate(_decoded(container, stream, needed)):
            number = numbers.get(frame.pts, -1) if stamps else position
            for _ in range(wanted.pop(number, 0)):
                yield frame
                given += 1
            if not wanted:
                return
    raise DataError(f"video ends after {given} of the {len(indices)} frames that its metadata promise")


def _stamps(data: bytes, frames: int | None) -> list[int]:
    """Time stamps of all frames in the order they are shown; empty unless frames can be told apart by them.

    H.264 marks pictures that no other picture refers to (`nal_ref_idc` 0, ITU-T H.264 7.4.1): what is asked for is the
    same without them, to the last bit. Which frame a packet holds is known only where packets and frames are as many,
    each with a stamp of its own and none to be dropped.
    """
    if frames is None:
        return []
    with _container(data) as container:
        stream = container.streams.video[0]
        if stream.codec_context.name != "h264":
            return []
        # Packets are not kept: together they are the whole file once more.
        packets = [
            (packet.pts, packet.is_discard or packet.is_corrupt) for packet in container.demux(stream) if packet.size
        ]
    stamps = sorted({stamp for stamp, _ in packets if stamp is not None})
    clean = not any(dropped for _, dropped in packets)
    return stamps if clean and len(stamps) == len(packets) == frames else []


def _container(data: bytes) -> Any:
    import av

    if not data:
        raise DataError("video file is empty (0 bytes)")
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


def _decoded(container: Any, stream: Any, needed: Collection[int] | None = None) -> Iterator[Any]:
    """Frames in the order they are shown: all, or at least those with the time stamps that are needed."""
    import av

    stream.thread_count = 1  # workers are the parallelism; more threads in each only fight for the cores
    try:
        if needed is None:
            yield from container.decode(stream)
            return
        for packet in container.demux(stream):
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
            yield from packet.decode()
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"video is damaged: {error}") from error
