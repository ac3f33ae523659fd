"""One Mamba-2 layer of the 12B under context parallelism: both of our forms and stock megatron-core's, same GPUs.

    python benchmarks/mamba_context.py --processes 2 --out results.json

Every process holds its part of the tokens of one document (stock megatron-core: in its own zig-zag order; the layer's
work does not depend on the values). A timed iteration is forward and backward in bf16 with both projections; the median
of ten, between CUDA events on rank 0, after three to warm up. Random data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

from ranks import rank_parser, start_ranks

LENGTHS = (32768, 131072, 311296)
WARM, TIMED = 3, 10
STALL_SECONDS = 240


def main() -> None:
    """Parent: start the ranks and print. Child: one rank."""
    parser = rank_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    args = parser.parse_args()
    if args.rank is not None:
        measure(args)
        return
    start_ranks(args.processes)
    for row in json.loads(args.out.read_text())["rows"]:
        print(
            " ".join(
                f"{key}={value:.2f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )


def measure(args: argparse.Namespace) -> None:
    """Time every form at every length on this rank."""
    import faulthandler

    import torch
    import torch.distributed as dist
    from triton_choices import use_choices

    from nemovl_train.config.schema import LanguageConfig, ParallelConfig
    from nemovl_train.parallel.layout import Layout

    faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
    os.environ["LOCAL_RANK"] = str(args.rank)
    torch.cuda.set_device(args.rank)
    dist.init_process_group(
        "nccl", store=dist.FileStore(args.store, args.processes), rank=args.rank, world_size=args.processes
    )
    use_choices()
    config = LanguageConfig(hybrid_pattern="M")
    rows = []
    for context in ("state_passing", "head_exchange", "stock"):
        ours = "state_passing" if context == "stock" else context
        layout = Layout.create(ParallelConfig(cp=args.processes, mamba_context=ours), config)
        mixer = stock_mixer(config, layout) if context == "stock" else our_mixer(config, layout)
        for length in args.lengths:
            if args.rank == 0:
                print(context, length, flush=True)
            faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
            row = {"form": context, "tokens": length, "ranks": args.processes}
            if context == "stock" and length * mixer.in_proj.weight.shape[0] // args.processes >= 2**31:
                rows.append(row | {"failed": "beyond the 32-bit offsets of the kernels in one call"})
                continue
            try:
                rows.append(row | timed(mixer, layout, config, length, stock=context == "stock"))
            except torch.OutOfMemoryError:
                rows.append(row | {"failed": "out of memory"})
            torch.cuda.empty_cache()
        del mixer
        layout.destroy()
    if args.rank == 0:
        names = ("torch", "triton", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d")
        result = {
            "case": "mamba_context",
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python", *sys.argv[:1], "--processes", str(args.processes)]),
            "gpu": f"{args.processes} x {torch.cuda.get_device_name()}",
            "versions": {name: version(name) for name in names},
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1))
    faulthandler.cancel_dump_traceback_later()


def our_mixer(config, layout):
    """`PackedMambaMixer` with Transformer Engine linears."""
    import torch

    from nemovl_train.model.backend import select_backend
    from nemovl_train.model.init import init_weights
    from nemovl_train.model.language import language_transformer_config
    from nemovl_train.model.mixer import MambaMixerSubmodules, PackedMambaMixer

    te = select_backend("te")
    mixer = PackedMambaMixer(
        language_transformer_config(config, layout, torch.bfloat16),
        MambaMixerSubmodules(in_proj=te.column_linear, out_proj=te.row_linear),
        config.hidden_size,
        layer_number=1,
        pg_collection=layout.language_groups,
        context=layout.mamba_context,
    )
    init_weights(mixer, seed=1, std=0.02)
    return mixer


def stock_mixer(config, layout):
    """megatron-core's own mixer, as its hybrid stack builds it."""
    import torch
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules

    from nemovl_train.model.language import language_transformer_config

    transformer = language_transformer_config(config, layout, torch.bfloat16, perform_initialization=True)
    return MambaMixer(
        transformer,
        MambaMixerSubmodules(in_proj=TEColumnParallelLinear, out_proj=TERowParallelLinear),
        config.hidden_size,
        layer_number=1,
        pg_collection=layout.language_groups,
    )


def timed(mixer, layout, config, length: int, *, stock: bool) -> dict:
    """Median milliseconds of forward and backward, and the peak of memory."""
    import torch
    import torch.distributed as dist

    from nemovl_train.model.packing import PackParams

    held = layout.context_tokens(length)
    hidden = torch.randn(len(held), 1, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(hidden)
    ids = torch.zeros(1, length, dtype=torch.int32, device="cuda")
    ends = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    pack = None if stock else PackParams.from_boundaries(ends, ids, length, held)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for iteration in range(WARM + TIMED):
        mixer.zero_grad(set_to_none=True)
        hidden.grad = None
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out, _ = mixer(hidden, packed_seq_params=pack)
        out.backward(grad)
        end.record()
        torch.cuda.synchronize()
        if iteration >= WARM:
            times.append(begin.elapsed_time(end))
    assert torch.isfinite(hidden.grad).all()
    times.sort()
    return {
        "median_ms": times[TIMED // 2],
        "min_ms": times[0],
        "max_ms": times[-1],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


if __name__ == "__main__":
    # The library of this checkout, installed or not.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
