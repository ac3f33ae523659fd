"""The media path of one worker: full images and video frames a second on one core, and how true the pixels are.

    python benchmarks/media.py image --out FILE                     # JPEG of 1664 x 1248 to 12 tiles and a thumbnail
    python benchmarks/media.py video --clip clip.mp4 --out FILE     # 2 frames a second of a clip, each to one tile

Rates are the best of three passes, by wall time and by the process's own CPU time. Without `--clip` one of 1280 x 720
at 30 frames a second is made: moving noise of high detail, harder to decode than most films.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from data_pipelines.media.image import decode_image, image_tiles, resize
from data_pipelines.media.rules import MediaLayout, sample_frames
from data_pipelines.media.video import decoded_frames, probe, video_tiles

REPEATS = 3
TILE = 512


def main() -> None:
    """Run one part and write its numbers with date, machine and command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("image", "video"))
    parser.add_argument("--clip", type=Path, help="video to measure on")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = image() if args.part == "image" else video(args.clip)
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python benchmarks/media.py {args.part}" + (f" --clip {args.clip.name}" if args.clip else ""),
        "machine": f"{psutil.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "load": psutil.getloadavg()[0],
        "result": result,
    }
    args.out.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


def _rates(work: Callable[[], int]) -> dict[str, float]:
    """Items a second of `work`, which returns how many it made."""
    walls, cpus = [], []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        count = work()
        walls.append(count / (time.perf_counter() - wall))
        cpus.append(count / (time.process_time() - cpu))
    return {"per_second": round(max(walls), 1), "per_cpu_second": round(max(cpus), 1)}


def _noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8 with detail of many sizes, as a photo has."""
    draw = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3), dtype=np.float32)
    for scale, weight in ((64, 90), (16, 40), (4, 20), (1, 8)):
        small = draw.integers(0, 255, (height // scale + 1, width // scale + 1, 3), dtype=np.uint8)
        grown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        layers += weight * (np.asarray(grown, dtype=np.float32) / 127.5 - 1)
    return (128 + layers).clip(0, 255).astype(np.uint8)


def image() -> dict[str, Any]:
    """Bytes of a JPEG to tiles, and the tiles against Pillow's."""
    out = io.BytesIO()
    Image.fromarray(_noise(1664, 1248)).save(out, "JPEG", quality=90)
    data = out.getvalue()
    layout = MediaLayout("image", (4, 3), True)

    def work() -> int:
        for _ in range(20):
            assert len(image_tiles(decode_image(data), layout, TILE)) == 13
        return 20

    return {
        "jpeg_bytes": len(data),
        "tiles": layout.tiles,
        "images": _rates(work),
        "largest_difference_to_pillow_bicubic": {
            f"{w}x{h} to {width}x{height}": _difference(_noise(w, h), width, height)
            for w, h, width, height in ((1664, 1248, 2048, 1536), (1664, 1248, 512, 512), (4000, 3000, 2048, 1536))
        },
    }


def _difference(pixels: np.ndarray, width: int, height: int) -> int:
    theirs = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    ours = resize(torch.from_numpy(pixels.copy()), width, height).permute(1, 2, 0).numpy().astype(np.int16)
    return int(np.abs(ours - theirs).max())


def video(clip: Path | None) -> dict[str, Any]:
    """Bytes of a clip to tiles at 2 frames a second, and what FFmpeg's scaler would have made of the same frames."""
    data = clip.read_bytes() if clip else _clip()
    shape = probe(data)
    frames = sample_frames(shape.frames, shape.fps, target_fps=2.0, max_frames=128)

    def work() -> int:
        return len(video_tiles(data, frames, TILE, shape.frames))

    ours = video_tiles(data, frames, TILE, shape.frames).numpy().astype(np.int16)
    differences = []
    for tile, frame in zip(ours, decoded_frames(data, frames), strict=True):
        scaled = frame.reformat(width=TILE, height=TILE, format="rgb24", interpolation="BICUBIC").to_ndarray()
        differences.append(np.abs(tile - scaled.transpose(2, 0, 1).astype(np.int16)))
    return {
        "clip": f"{shape.width}x{shape.height}, {shape.frames} frames, {shape.fps:g} a second, {len(data)} bytes",
        "sampled": len(frames),
        "decoded": frames[-1] + 1,
        "sampled_frames": _rates(work),
        "mean_difference_to_the_decoders_scaler": round(float(np.mean(differences)), 2),
    }


def _clip(frames: int = 240) -> bytes:
    import av

    out = io.BytesIO()
    scene = _noise(1800, 900)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 1280, 720, "yuv420p", 3_000_000
        for i in range(frames):
            pixels = np.ascontiguousarray(scene[i // 2 : 720 + i // 2, 2 * i : 1280 + 2 * i])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


if __name__ == "__main__":
    main()
