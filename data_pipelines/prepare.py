"""Work done once before an import: frames out of long videos, pages out of PDFs."""

import io
import json
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers.documents import pdf_pages
from data_pipelines.importers.formats import METADATA_JSON
from data_pipelines.importers.tables import root_of, source_files
from data_pipelines.media.kinds import VIDEO_SUFFIXES
from data_pipelines.media.rules import MIN_FRAMES
from data_pipelines.media.video import decoded_frames, probe

_MOVED_WITH = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_JPEG_SCALE = 3
"""MJPEG quantiser, 2 (best) to 31."""


def extract_frames(source: Path, out: Path, *, fps: float, max_frames: int, side: int) -> dict[str, Any]:
    """Copy a folder with each video reduced to the frames that training looks at.

    A copy keeps its name, so records go on pointing at it. It holds `fps` frames a second, at least 8 where the video
    has them, at most `max_frames`, each coded for itself (MJPEG) and scaled so that its shorter side has `side` pixels
    at most. Frame i is the one shown at i / rate seconds; where `max_frames` lowers the rate, importing the original
    would take the middles of equal segments instead.

    Returns:
        `videos`, `frames`, and `failed`: name and reason of each video that could not be read.

    Raises:
        DataError: `out` exists, there is no video, or a link leads outside the source.
    """
    if out.exists():
        raise DataError(f"{out} exists already; choose another --out")
    root = root_of(source)
    paths = source_files(source, tuple(f".{suffix}" for suffix in VIDEO_SUFFIXES))
    if not paths:
        raise DataError(f"{source} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    beside = source_files(source, _MOVED_WITH) if source.is_dir() else []
    frames = 0
    failed = []
    for path in paths:
        target = out / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            data, count = reduced_video(path.read_bytes(), fps=fps, max_frames=max_frames, side=side)
        except DataError as error:
            failed.append({"file": path.relative_to(root).as_posix(), "reason": str(error)})
            continue
        target.write_bytes(data)
        frames += count
    for path in beside:
        target = out / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return {"out": str(out), "videos": len(paths) - len(failed), "frames": frames, "failed": failed}


def reduced_video(data: bytes, *, fps: float, max_frames: int, side: int) -> tuple[bytes, int]:
    """A video of few frames, and their number.

    Raises:
        DataError: It cannot be decoded.
    """
    shape = probe(data)
    seconds = shape.frames / shape.fps
    count = min(max(round(seconds * fps), MIN_FRAMES), max_frames, shape.frames)
    rate = fps if count == round(seconds * fps) else count / seconds
    indices = [min(int(i * shape.fps / rate), shape.frames - 1) for i in range(count)]
    scale = min(1.0, side / min(shape.width, shape.height))
    size = [max(2, round(length * scale / 2) * 2) for length in (shape.width, shape.height)]
    return _encode(data, indices, size, Fraction(rate).limit_denominator(1000)), count


def _encode(data: bytes, indices: Sequence[int], size: Sequence[int], rate: Fraction) -> bytes:
    import av

    out = io.BytesIO()
    # Without bitexact the container gets a random identifier, and the same video other bytes every time.
    with av.open(out, "w", format="matroska", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=rate, options={"qmin": str(_JPEG_SCALE), "qmax": str(_JPEG_SCALE)})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for number, frame in enumerate(decoded_frames(data, indices)):
            scaled = frame.reformat(*size, format="yuvj420p")
            scaled.pts, scaled.time_base = number, 1 / rate
            container.mux(stream.encode(scaled))
        container.mux(stream.encode())
    return out.getvalue()


def render_pdfs(source: Path, out: Path, *, dpi: int) -> dict[str, Any]:
    """Render PDFs to PNG pages with a metadata file that `nemovl data import` reads, or that questions are added to.

    Returns:
        `documents`, `pages`, and `failed`: name and reason of each PDF that could not be read.

    Raises:
        DataError: `out` exists, there is no PDF, or a link leads outside the source.
    """
    if out.exists():
        raise DataError(f"{out} exists already; choose another --out")
    paths = source_files(source, (".pdf",))
    if not paths:
        raise DataError(f"{source} holds no .pdf files")
    out.mkdir(parents=True)
    lines, failed = [], []
    for path in paths:
        name = path.relative_to(root_of(source)).with_suffix("")
        (out / name).mkdir(parents=True, exist_ok=True)
        try:
            for page in pdf_pages(path, dpi=dpi):
                file = name / f"{page.number + 1:05d}.png"
                (out / file).write_bytes(page.png)
                lines.append({"file_name": file.as_posix(), "text": page.text})
        except DataError as error:
            failed.append({"file": path.name, "reason": str(error)})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / METADATA_JSON).write_text(text, encoding="utf-8")
    return {"out": str(out), "documents": len(paths) - len(failed), "pages": len(lines), "failed": failed}
