"""Fine-tune the 12B VLM (13 billion parameters) under DeepSpeed, for its rate and its memory on the GPU and the host.

    python benchmarks/deepspeed_13b.py --processes 2 --out O.json               # optimizer on the host
    python benchmarks/deepspeed_13b.py --processes 4 --no-offload --out O.json  # all on the GPUs
    python benchmarks/deepspeed_13b.py --processes 1 --layers 18 --out O.json   # what 128 GiB of host memory hold
    python benchmarks/deepspeed_13b.py --processes 1 --train vision,projector --out O.json
    python benchmarks/deepspeed_13b.py --processes 2 --small --out O.json       # CPU, laptop widths

Stage 3 unless told otherwise. Weights are random, packs are random documents with tiles in some; every step takes
`--packs` packs over all ranks. The first step, which compiles kernels and fills caches, is not in the rate. Host memory
is the resident set of each rank, sampled, and what the machine lacked at its worst compared with the start. The result
is written after every step, so that what a run did counts even if it is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-5
SAMPLE_SECONDS = 0.5


def arguments() -> argparse.Namespace:
    """Options of the command."""
    from ranks import rank_parser

    parser = rank_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--packs", type=int, default=8, help="packs of a step over all ranks")
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--no-offload", action="store_true", help="optimizer state stays on the GPUs")
    parser.add_argument("--offload-params", action="store_true")
    parser.add_argument("--train", default="vision,projector,language", help="parts that train")
    parser.add_argument("--layers", type=int, help="the first so many layers of the language model alone")
    parser.add_argument("--small", action="store_true", help="laptop widths, fp32")
    return parser.parse_args()


class HostMemory(threading.Thread):
    """Samples this process's resident set and what the machine has left."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.resident = self.taken = 0
        self._done = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        import psutil

        process, start = psutil.Process(), psutil.virtual_memory().available
        while True:
            self.resident = max(self.resident, process.memory_info().rss)
            self.taken = max(self.taken, start - psutil.virtual_memory().available)
            if self._done.wait(SAMPLE_SECONDS):
                return

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self.join()

    def worst(self) -> dict[str, float]:
        """GiB so far."""
        return {"resident_gib": self.resident / 2**30, "machine_gib": self.taken / 2**30}


def run_config(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The run, and the shape of its packs."""
    from dataclasses import replace

    from nemovl_train.config.compose import compose_run

    config = compose_run("tiny/finetune_deepspeed" if args.small else "finetune/deepspeed")
    if args.layers:
        language = config.model.language
        language = replace(language, hybrid_pattern=language.hybrid_pattern[: args.layers])
        config = replace(config, model=replace(config.model, language=language))
    length, per_tile = 256 if args.small else args.seq_length, config.model.tokens_per_tile
    lengths = [int(length * share) for share in (0.3, 0.15, 0.5)]
    tiles = [int(document * share) // per_tile for document, share in zip(lengths, (0.6, 0.0, 0.6), strict=True)]
    shapes = {"lengths": tuple(lengths), "tiles": tuple(tiles), "seq_length": length}
    engine = replace(
        config.engine,
        zero_stage=args.zero_stage,
        offload_optimizer=not args.no_offload,
        offload_params=args.offload_params,
    )
    trainer = replace(config.trainer, global_batch=args.packs, train=tuple(args.train.split(",")))
    return replace(config, engine=engine, trainer=trainer), shapes


def train(args: argparse.Namespace) -> None:
    """Measure on one rank; its part of the result is written after every step."""
    import torch
    from gpu_packs import random_pack

    from nemovl_train.parallel.layout import Layout, shutdown
    from nemovl_train.training.step import train_step

    host = HostMemory()
    host.start()
    config, shapes = run_config(args)
    layout = Layout.create(config.parallel, config.model.language)
    cuda = layout.device.type == "cuda"
    if cuda:
        from triton_choices import use_choices

        use_choices()
    began = time.perf_counter()
    engine, row = open_model(config, layout)
    row |= {"rank": layout.rank, "layers": config.model.language.num_layers}
    row |= {"open_seconds": time.perf_counter() - began, "gpu_peak_gib_opening": _peak_gib(cuda)}
    if layout.rank == 0:
        print(f"open after {row['open_seconds']:.0f} s; {host.worst()}", flush=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    results = []
    for step in range(args.steps):
        packs = [random_pack(config.model, seed=step * args.packs + i, **shapes) for i in range(args.packs)]
        own = packs[layout.dp_rank :: layout.dp]
        results.append(train_step(engine, own, layout, lr=LEARNING_RATE, divisor="global"))
        if layout.rank == 0:
            print(f"step {step + 1}: loss {results[-1].loss:.4f}  {results[-1].seconds:.1f} s", flush=True)
        row |= rates(results, layout.world_size)
        row |= {"gpu_peak_gib_training": _peak_gib(cuda), "host": host.worst()}
        part_of(args, layout.rank).write_text(json.dumps(row))
    host.stop()
    engine.close()
    layout.destroy()
    shutdown()


def open_model(config: Any, layout: Any) -> tuple[Any, dict[str, Any]]:
    """The engine around a model with random weights, and what is in it."""
    import torch

    from nemovl_train.model.backend import DTYPES
    from nemovl_train.model.vlm import build_model
    from nemovl_train.training.engine import open_engine

    model = build_model(
        config.model,
        layout,
        params_dtype=DTYPES[config.precision.params],
        backend=config.precision.backend,
        seed=config.trainer.seed,
        recompute=config.recompute,
        draw_on=layout.device,
    )
    model.freeze(config.trainer.train)
    row = {
        "device": torch.cuda.get_device_name() if layout.device.type == "cuda" else "CPU",
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return open_engine(model, layout, config), row


def rates(results: list, ranks: int) -> dict[str, Any]:
    """Of the steps so far; the first one counts only while it is alone."""
    steady = statistics.median([result.seconds for result in results[1:] or results])
    return {
        "step_seconds": [result.seconds for result in results],
        "tokens_per_second": results[-1].tokens / steady,
        "tokens_per_second_per_gpu": results[-1].tokens / steady / ranks,
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
    }


def part_of(args: argparse.Namespace, rank: int) -> Path:
    """A rank's part of the result."""
    return args.out.with_name(f"{args.out.name}.{rank}")


def _peak_gib(cuda: bool) -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def main() -> None:
    """Without a rank: start all of them and put their rows together. With one: measure."""
    args = arguments()
    assert args.steps >= 2, "the first step does not count"
    assert args.packs % args.processes == 0, "packs divide evenly between ranks"
    if args.rank is not None:
        address = {"RANK": args.rank, "LOCAL_RANK": args.rank, "WORLD_SIZE": args.processes}
        os.environ.update({name: str(value) for name, value in address.items()})
        train(args)
        return
    from ranks import start_ranks

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    # The update of what lies in host memory is the host's.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
    try:
        start_ranks(args.processes)
    finally:
        put_together(args)


def put_together(args: argparse.Namespace) -> None:
    """One file of what the ranks wrote."""
    from versions import versions

    parts = [part for rank in range(args.processes) if (part := part_of(args, rank)).exists()]
    if not parts:
        return
    result = {
        "case": "deepspeed_13b",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(("torch", "deepspeed", "megatron-core", "transformer-engine")),
        "ranks": [json.loads(part.read_text()) for part in parts],
    }
    args.out.write_text(json.dumps(result, indent=1))
    for part in parts:
        part.unlink()
    first = result["ranks"][0]
    print(
        f"{first['parameters'] / 1e9:.2f}e9 parameters, {first['trained'] / 1e9:.2f}e9 trained: "
        f"{first['tokens_per_second_per_gpu']:.0f} tokens/s/GPU, {first['gpu_peak_gib_training']:.1f} GiB a GPU, "
        f"{max(row['host']['machine_gib'] for row in result['ranks']):.1f} GiB of host memory"
    )


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests" / "gpu")]
    main()
