"""Should one rank build a pack and hand it to the others that share it? What building costs, what handing over does.

    python benchmarks/pack_sharing.py --processes 4 --out FILE

Every rank of a tensor x context parallel group builds its packs whole, with workers that run ahead of the step. The
other way is one builder, and a broadcast over the host's group in front of each step. Packs of 16,384 tokens hold
pictures of 12 tiles and a thumbnail, those of 49,152 tokens clips of 1280 x 720; the first rank builds, all receive.
"""

from __future__ import annotations

import io
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from data import _record, _write
from media import _clip, _noise
from PIL import Image
from ranks import rank_parser, start_ranks

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.loader import open_sources, plan_of
from data_pipelines.pack import PackBuilder
from data_pipelines.schema import Pack

PACKS, REPEATS = 4, 3
SAMPLES = 64


def main() -> None:
    """Start the ranks, or be one."""
    parser = rank_parser(__doc__)
    args = parser.parse_args()
    if args.rank is None:
        start_ranks(args.processes)
        return
    torch.set_num_threads(1)
    store = dist.FileStore(args.store, args.processes)
    dist.init_process_group("gloo", store=store, rank=args.rank, world_size=args.processes)
    kinds = {"pictures": (_pictures, 16384), "clips": (_clips, 49152)}
    found = {name: _measure(name, *kind) for name, kind in kinds.items()}
    if args.rank == 0:
        about = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": f"python benchmarks/pack_sharing.py --processes {args.processes}",
            "machine": f"{psutil.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
            "load": psutil.getloadavg()[0],
        }
        args.out.write_text(json.dumps({**about, "result": found}, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    dist.destroy_process_group()


def _measure(name: str, samples: Any, seq_length: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    payload = torch.empty(0, dtype=torch.uint8)
    if dist.get_rank() == 0:
        packs, found = _built(name, samples(), seq_length)
        payload = max((pack.tiles for pack in packs), key=len).flatten()
    size = torch.tensor([len(payload)])
    dist.broadcast(size, src=0)
    if dist.get_rank():
        payload = torch.empty(int(size), dtype=torch.uint8)
    walls = []
    for _ in range(REPEATS):
        dist.barrier()
        began = time.perf_counter()
        dist.broadcast(payload, src=0)
        dist.barrier()
        walls.append(time.perf_counter() - began)
    return {**found, "megabytes": round(int(size) / 1e6, 1), "broadcast_seconds": round(min(walls), 3)}


def _built(name: str, samples: Iterator[Any], seq_length: int) -> tuple[list[Pack], dict[str, Any]]:
    """Some packs, and the processor seconds that one takes; a worker is one such process."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sources = {name: SourceConfig(path=str(_write(work, samples)))}
        config = DataConfig(sources=sources, tokenizer=str(work / "tokenizer"), seq_length=seq_length)
        opened = open_sources(config, 256)
        plan = plan_of(config, opened, seed=1, global_batch=1)
        builder = PackBuilder(config, opened.datasets, opened.rules, opened.tokenizer)
        builder.build(plan.pack(0))
        began = time.process_time()
        packs = [builder.build(plan.pack(i)).pack for i in range(PACKS)]
        seconds = (time.process_time() - began) / PACKS
        for dataset in opened.datasets.values():
            dataset.close()
    tokens = sum(pack.stats["tokens"] for pack in packs) / PACKS
    tiles = sum(len(pack.tiles) for pack in packs) / PACKS
    return packs, {
        "seq_length": seq_length,
        "tiles_of_a_pack": tiles,
        "build_cpu_seconds": round(seconds, 2),
        "tokens_per_cpu_second": round(tokens / seconds),
    }


def _pictures() -> Iterator[Any]:
    for number in range(SAMPLES):
        out = io.BytesIO()
        Image.fromarray(_noise(1664, 1248, seed=number)).save(out, "JPEG", quality=90)
        yield _record(f"photo-{number}", "image", "photo.jpg"), {"photo.jpg": out.getvalue()}


def _clips() -> Iterator[Any]:
    data = _clip()
    for number in range(SAMPLES):
        yield _record(f"clip-{number}", "video", "clip.mp4"), {"clip.mp4": data}


if __name__ == "__main__":
    main()
