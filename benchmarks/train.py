"""Training speed and memory: useful tokens a second and GPU, MFU, peak memory and loss of the cases in `cases/`.

    python benchmarks/train.py unit_none unit_selective unit_full --out O.json      # one H100
    python benchmarks/train.py B9 --out O.json                                      # loss head alone
    python benchmarks/train.py unit_none --profile P.txt --out O.json               # where a step goes
    python benchmarks/train.py B1 --set recompute.language=selective steps=4 --out O.json
    python benchmarks/train.py unit_full --small --out O.json                       # CPU, laptop widths

A case may list others beside itself: the same packs and initial weights in another layout or in a peer, which run after
it and are compared with it. `--only ENGINE` runs those of one program.

Cases of one command run one after the other in one group of processes and must ask for equally many. Weights and data
are random, never zero. A step is zeroing gradients, all micro-batches, reduction, clipping and update, by the wall
clock between device synchronisations; reported are medians. Tokens of padding do not count, neither do model FLOPs of
recomputation; a document's attention counts by its own length (model/flops.py). MFU is against 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ranks import rank_parser, start_ranks
from versions import versions

PEAK_FLOPS = 989e12
STALL_SECONDS = 240


def main() -> None:
    """Parent: start the ranks and print. Child: one rank through all cases."""
    parser = rank_parser(__doc__)
    parser.add_argument("names", nargs="+", metavar="CASE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the cases")
    parser.add_argument("--small", action="store_true", help="laptop widths, plain PyTorch in fp32")
    parser.add_argument("--only", metavar="ENGINE", help="leave out other programs")
    parser.add_argument("--profile", type=Path, help="also write where a step of each case goes")
    parser.set_defaults(processes=None)
    args = parser.parse_args()

    # Of this checkout, installed or not.
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    from train_cases import load_cases

    cases = [case for name in args.names for case in load_cases(name, args.set)]
    cases = [case for case in cases if args.only in (None, case.engine)]
    if args.small:
        cases = [case.small() for case in cases]
    sizes = {case.gpus for case in cases}
    if len(sizes) > 1 and args.processes is None:
        raise SystemExit(f"these cases want {sorted(sizes)} processes: run those of one size together")
    args.processes = args.processes or sizes.pop()
    if args.rank is None:
        start_ranks(args.processes)
        rows = json.loads(args.out.read_text())["rows"]
        for row in rows:
            print(" ".join(f"{key}={_short(value)}" for key, value in row.items() if not isinstance(value, dict)))
        print("\n".join(comparisons(rows)))
        return
    run_rank(cases, args)


def run_rank(cases: list, args: argparse.Namespace) -> None:
    """All cases on this rank; the first rank writes the file after each, so that what is done is not lost."""
    import faulthandler

    import torch
    import torch.distributed as dist
    from loss_head import measure_head

    cuda = torch.cuda.is_available() and not args.small
    if cuda:
        from triton_choices import use_choices

        os.environ["LOCAL_RANK"] = str(args.rank)
        torch.cuda.set_device(args.rank)
        use_choices()
    store = dist.FileStore(args.store, args.processes)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=args.rank, world_size=args.processes)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv[: sys.argv.index("--store")]]),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "versions": versions(),
        "rows": [],
    }
    for case in cases:
        faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
        began = time.perf_counter()
        row: dict[str, Any] = {"case": case.case, "engine": case.engine, "processes": args.processes}
        try:
            row |= measure_head(case) if case.kind == "head" else measure_training(case, args)
        except torch.OutOfMemoryError as error:
            row |= {"failed": f"out of memory: {str(error).splitlines()[0]}"}
        except Exception as error:
            if args.processes > 1:
                raise  # the others wait for this rank
            traceback.print_exc()
            row |= {"failed": repr(error)}
        row["wall_seconds"] = time.perf_counter() - began
        result["rows"].append(row | {"options": asdict(case)})
        if args.rank == 0:
            args.out.write_text(json.dumps(result, indent=1))
            print(f"{case.case} {case.engine}: done in {row['wall_seconds']:.0f} s", flush=True)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def measure_training(case: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One case on this rank."""
    import torch

    from nemovl_train.parallel.layout import Layout

    config = case.model(small=args.small)
    layout = Layout.create(case.parallel, config.language)
    try:
        row = {"before_gib": torch.cuda.memory_allocated() / 2**30} if layout.device.type == "cuda" else {}
        return row | _train(case, config, layout, args)
    finally:
        layout.destroy()


def _train(case: Any, config: Any, layout: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Ranks wait for each other in every step, so one rank's clock is every rank's."""
    import torch

    from nemovl_train.model.flops import training_flops
    from nemovl_train.training.profiling import profiled
    from nemovl_train.training.step import train_step

    cuda = layout.device.type == "cuda"
    optimizers = _engine(case, config, layout, small=args.small)
    packs = make_packs(case, config, layout.dp_rank)
    flops = [
        training_flops(
            config,
            document_lengths=_documents(pack),
            num_tiles=len(pack.tiles),
            head_tokens=pack.stats["supervised_tokens"],
            train=case.train,
            adapted=("language",) if case.adapted else (),
        ).total
        for pack in packs
    ]
    seconds, losses, tokens, work, taken = [], [], [], [], 0

    def step() -> None:
        nonlocal taken
        chosen = [(taken + i) % len(packs) for i in range(case.micro_batches)]
        taken += case.micro_batches
        began = _now(cuda)
        result = train_step(
            optimizers, [packs[i] for i in chosen], layout, lr=case.optim.lr, divisor=case.optim.loss_divisor
        )
        seconds.append(_now(cuda) - began)
        losses.append(result.loss)
        tokens.append(result.tokens)
        work.append(sum(flops[i] for i in chosen) * layout.dp)

    for number in range(case.warm):
        step()
        if layout.rank == 0:
            said = f"warm step {number} {seconds[-1]:.2f} s loss {losses[-1]:.4f}"
            print(f"{case.case} {case.engine}: {said}", flush=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(case.steps):
        step()
    timed = slice(case.warm, None)
    row = _rates(seconds[timed], tokens[timed], work[timed], layout.world_size)
    row |= {"loss_first": losses[0], "loss_last": losses[-1], "parameters": optimizers.num_parameters()}
    if cuda:
        free, total = torch.cuda.mem_get_info()
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        row["device_used_gib"] = (total - free) / 2**30
    else:
        row["mfu"] = None
    if args.profile:
        row["profile"] = profiled(step, args.profile, title=f"{case.case} {case.engine}", write=layout.rank == 0)
    return row


def _engine(case: Any, config: Any, layout: Any, *, small: bool) -> Any:
    """The model of a case in its program, ready to train."""
    import torch

    from nemovl_train.model.adapters import add_adapters
    from nemovl_train.model.vlm import build_model
    from nemovl_train.training.optimizer import Optimizers

    dtype = torch.float32 if small else torch.bfloat16
    if case.engine == "stock":
        from peer_stock import stock_engine

        return stock_engine(case, config.language, layout, dtype, small=small)
    model = build_model(
        config,
        layout,
        params_dtype=dtype,
        backend="torch" if small else "te",
        recompute=case.recompute,
        precision=case.precision,
        draw_on=layout.device,
    )
    if case.engine == "transformers":
        from peer_transformers import TransformersEngine

        return TransformersEngine(model, config, layout, case, dtype)
    assert (case.engine, case.form) == ("ours", "packed"), "engine is ours, stock or transformers; forms are for peers"
    add_adapters(model, case.adapter, layout, seed=1234)
    model.freeze(train=case.train)
    return Optimizers(model, layout, case.optim, dtype)


def comparisons(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each run beside a case's first: how many times its rate the first has, and whether losses agree."""
    lines, first = [], {}
    for row in rows:
        if "tokens_per_second_per_gpu" not in row:
            continue
        own = first.setdefault(row["case"], row)
        if own is not row:
            times = own["tokens_per_second_per_gpu"] / row["tokens_per_second_per_gpu"]
            losses = f"losses {own['loss_first']:.4f} -> {own['loss_last']:.4f} and "
            losses += f"{row['loss_first']:.4f} -> {row['loss_last']:.4f}"
            lines.append(f"{row['case']}: {own['engine']} is {times:.2f} x {row['engine']}; {losses}")
    return lines


def _rates(seconds: list[float], tokens: list[int], work: list[float], gpus: int) -> dict[str, Any]:
    pairs = list(zip(seconds, tokens, work, strict=True))
    return {
        "median_step_seconds": statistics.median(seconds),
        "fastest_step_seconds": min(seconds),
        "slowest_step_seconds": max(seconds),
        "tokens_per_second_per_gpu": statistics.median(t / s / gpus for s, t, _ in pairs),
        "mfu": statistics.median(w / s / gpus / PEAK_FLOPS for s, _, w in pairs),
    }


def make_packs(case: Any, config: Any, dp_rank: int) -> list:
    """Packs of random documents, image tokens first, every other token a target; sizes rounded as in training."""
    import numpy as np
    import torch

    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "gpu")]
    from gpu_packs import random_pack

    from data_pipelines.config import DataConfig
    from data_pipelines.pack import pad_bounds, round_up

    buckets, packs = DataConfig(), []
    for number in range(case.packs):
        random = np.random.default_rng([dp_rank, number])
        lengths = [case.seq_length] if not case.mean_tokens else []
        while (left := case.seq_length - sum(lengths)) > 0:
            drawn = random.lognormal(np.log(case.mean_tokens) - case.sigma**2 / 2, case.sigma)
            multiple = case.document_multiple
            lengths.append(min(left, max(round(drawn / multiple) * multiple, multiple, 16)))
        tiles = tuple(int(length * case.visual / config.tokens_per_tile) for length in lengths)
        pack = random_pack(
            config, lengths=tuple(lengths), tiles=tiles, seq_length=case.seq_length, seed=1000 * dp_rank + number
        )
        packs.append(
            replace(
                pack,
                cu_seqlens=torch.from_numpy(pad_bounds(pack.cu_seqlens.numpy(), buckets.document_bucket)),
                max_seqlen=min(round_up(pack.max_seqlen, buckets.max_seqlen_bucket), case.seq_length),
            )
        )
    return packs


def _documents(pack: Any) -> list[int]:
    """Lengths of the documents, without the empty ones that fill the bucket."""
    return [int(length) for length in pack.cu_seqlens.diff() if length]


def _now(cuda: bool) -> float:
    import torch

    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
