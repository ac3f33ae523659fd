"""The data side without a model: fill, balance, planning rate, seek, start-up, random reads, memory.

    python benchmarks/data.py plan --out FILE            # fill, straggler ratio, rate, seek; seconds
    python benchmarks/data.py plan --rows 100000000 ...  # the same over a hundred million samples (1.2 GB in --work)
    python benchmarks/data.py read --out FILE            # random reads from local shards, page cache warm
    python benchmarks/data.py memory --out FILE          # a worker's memory over 10,000 tiny packs and 300 of 16,384

`..._per_cpu_second` is of one process, other times are wall time; the best of three passes for reads. With many rows
the first case of `plan` also pays for bringing the counts from the page cache into the process.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_pipelines.fit import Fit
from data_pipelines.forecast import straggler
from data_pipelines.plan import Plan
from data_pipelines.sources import PlanSource

RANKS = 32
REPEATS = 3
ROWS = 600_000


def main() -> None:
    """Run one part and write its numbers with date, machine and command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "read", "memory"))
    parser.add_argument("--rows", type=int, default=ROWS, help="samples of the planned source (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for made data")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    run: dict[str, Callable[[argparse.Namespace], Any]] = {"plan": plan, "read": read, "memory": memory}
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python benchmarks/data.py {args.part} --rows {args.rows}",
        "machine": f"{psutil.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "load": psutil.getloadavg()[0],
    }
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        args.work = Path(folder)
        result = {**about, "result": run[args.part](args)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def vlm_lengths(count: int, seed: int = 0) -> np.ndarray:
    """[2, count] int32, total and text tokens of a mix: 25% captions of 1 to 5 tiles, 35% pages of 5 to 13, 25%
    questions of 1 to 13, 15% text; 256 tokens a tile, log-normal texts."""
    draw = np.random.default_rng(seed)
    kind = draw.choice(4, count, p=[0.25, 0.35, 0.25, 0.15])
    spans = [(1, 6), (5, 14), (1, 14)]
    tiles = np.select([kind == k for k in range(3)], [draw.integers(a, b, count) for a, b in spans])
    mean, sigma = np.array([4.5, 5.8, 4.2, 6.3])[kind], np.array([0.6, 0.8, 0.7, 0.9])[kind]
    text = np.minimum(np.exp(draw.normal(mean, sigma)).astype(np.int32) + 20, 9000)
    return np.stack([text + 256 * tiles, text]).astype(np.int32)


def _source(counts: np.ndarray) -> PlanSource:
    full = Fit(max_tiles=12, max_frames=128, length=0)
    lengths, text = counts
    return PlanSource(
        name="mix", weight=1.0, lengths=lengths, text_tokens=text, least=lengths, full=full,
        shrink=lambda row, limit: None, identity="mix", block=300,
    )  # fmt: skip


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Windows of a VLM-like mix, mapped from a file as a dataset's counts are."""
    path = args.work / "counts.npy"
    file = np.lib.format.open_memmap(path, "w+", np.int32, (2, args.rows))
    for start in range(0, args.rows, ROWS):
        size = min(ROWS, args.rows - start)
        file[:, start : start + size] = vlm_lengths(size, seed=start)
    file.flush()
    del file
    cases = [(16384, 128), (16384, 32), (49152, 128), (49152, 32)]
    return [_planned(path, length, batch, mode) for mode in ("bfd", "balanced") for length, batch in cases]


def _planned(path: Path, seq_length: int, batch: int, packing: str) -> dict[str, Any]:
    began = time.perf_counter()
    made = Plan(
        [_source(np.load(path, mmap_mode="r"))],
        seed=1, seq_length=seq_length, packing=packing, window_samples=16384, step_packs=batch,
    )  # fmt: skip
    started = time.perf_counter()
    made.pack(1_000_000)
    sought = time.perf_counter()
    cpu = time.process_time()
    windows = [made.window(k) for k in range(6)]
    cpu = time.process_time() - cpu
    used = sum(int(w.draw.lengths[items].sum()) for w in windows for items in w.bins)
    return {
        "packing": packing,
        "seq_length": seq_length,
        "global_batch": batch,
        "rows": made.rows[0],
        "window_packs": made.window_packs,
        "fill": round(used / (len(windows) * made.window_packs * seq_length), 5),
        "straggler_32_ranks": straggler(windows, batch, RANKS),
        "left_out": sum(w.dropped.total() for w in windows),
        "samples_per_cpu_second": round(sum(len(w.draw.rows) for w in windows) / cpu),
        "start_seconds": round(started - began, 3),
        "pack_1000000_seconds": round(sought - started, 3),
    }


def read(args: argparse.Namespace) -> dict[str, Any]:
    """Random samples of a picture of about 90 kB and a question, eight at a time as packs take them."""
    from data_pipelines.dataset import Dataset

    dataset = Dataset.open(_write(args.work, _photos(4000)), "train")
    order = np.random.default_rng(1).integers(0, len(dataset), 8000).tolist()
    rates = []
    for _ in range(REPEATS):
        wall, cpu, size = time.perf_counter(), time.process_time(), 0
        for start in range(0, len(order), 8):
            samples = dataset.read_many(order[start : start + 8])
            size += sum(len(data) for sample in samples for data in sample.media.values())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rates.append((len(order) / wall, len(order) / cpu, size / wall / 1e6))
    best = max(rates)
    return {
        "samples": len(dataset),
        "bytes_per_sample": round(dataset.mean_bytes),
        "reads_per_second": round(best[0]),
        "reads_per_cpu_second": round(max(rate[1] for rate in rates)),
        "megabytes_per_second": round(best[2]),
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Resident megabytes of one process that builds packs, at ten points of each run."""
    tiny = {"tile_size": 64, "max_tiles": 4, "max_frames": 8}
    full = {"tile_size": 512, "max_tiles": 12, "max_frames": 16}
    return {
        "10000_packs_of_256_with_videos": _resident(args.work, "tiny", _clips(60), 10_000, 256, tiny),
        "300_packs_of_16384_with_videos": _resident(args.work, "full", _photos_and_clips(60), 300, 16384, full),
    }


def _resident(
    work: Path, name: str, samples: Iterator[Any], packs: int, seq_length: int, rules: dict[str, int]
) -> dict[str, Any]:
    from data_pipelines.config import DataConfig, SourceConfig
    from data_pipelines.loader import open_sources, plan_of
    from data_pipelines.pack import PackBuilder

    folder = work / name
    sources = {"d": SourceConfig(path=str(_write(folder, samples, **rules)))}
    config = DataConfig(sources=sources, tokenizer=str(folder / "tokenizer"), seq_length=seq_length, **rules)
    opened = open_sources(config, (rules["tile_size"] // 32) ** 2)
    made = plan_of(config, opened, seed=1, global_batch=4)
    builder = PackBuilder(config, opened.datasets, opened.rules, opened.tokenizer)
    process, points, tiles = psutil.Process(), [], 0
    for number in range(packs):
        tiles += len(builder.build(made.pack(number)).pack.tiles)
        if (number + 1) % (packs // 10) == 0:
            points.append(round(process.memory_info().rss / 2**20, 1))
    return {"resident_mb": points, "tiles": tiles, "growth_mb_after_first_tenth": round(points[-1] - points[0], 1)}


def _write(work: Path, samples: Iterator[Any], **rules: int) -> Path:
    from data_pipelines.demo.tokenizer import train_demo_tokenizer
    from data_pipelines.shards import write_dataset

    train_demo_tokenizer(work / "tokenizer")
    return write_dataset(work / "d", {"train": samples}, name="d", tokenizer=work / "tokenizer", **rules)


def _record(key: str, kind: str, name: str) -> dict[str, Any]:
    content = [{"type": kind, kind: name}, {"type": "text", "text": f"What is in {key}?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"It is {key}. " * 4}]
    return {"id": key, "messages": messages}


def _photos(count: int, side: int = 480) -> Iterator[Any]:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (side // 8, side // 6, 3), dtype=np.uint8)
    base = np.asarray(Image.fromarray(noise).resize((side * 4 // 3, side)))
    for number in range(count):
        out = io.BytesIO()
        Image.fromarray(np.roll(base, 7 * number, axis=0)).save(out, "JPEG", quality=92)
        yield _record(f"photo-{number}", "image", "photo.jpg"), {"photo.jpg": out.getvalue()}


def _clips(count: int, side: int = 64) -> Iterator[Any]:
    import av

    for number in range(count):
        out = io.BytesIO()
        with av.open(out, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = side
            for shade in range(40):
                pixels = np.full((side, side, 3), (5 * shade + number) % 256, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        yield _record(f"clip-{number}", "video", "clip.mp4"), {"clip.mp4": out.getvalue()}


def _photos_and_clips(count: int) -> Iterator[Any]:
    for photo, clip in zip(_photos(count, side=1200), _clips(count, side=480), strict=True):
        yield photo
        yield clip


if __name__ == "__main__":
    main()
