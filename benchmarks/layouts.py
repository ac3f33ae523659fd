"""Train the same packs in several parallel layouts and compare losses and gradient norms step by step.

    python benchmarks/layouts.py --processes 4 --out O.json               # GPUs, te in bf16, 12B widths, shallow
    python benchmarks/layouts.py --processes 4 --dtype fp32 --out O.json  # the same, kernels and torch in fp32
    python benchmarks/layouts.py --processes 2 --dtype fp8 --out O.json   # linear layers in block-wise FP8
    python benchmarks/layouts.py --processes 2 --small --out O.json       # CPU, fp32, laptop widths

Starts torchrun once for all layouts. Every layout sees the same global batches (8 new packs every step, images in some)
and the same initial weights, which are keyed by parameter name and sliced, so that only the order of sums differs. Ends
with 1 if a layout's losses or gradient norms differ from the first's by more than the bounds, relatively.

A layout's name says how the processes are used: `tp2sp` tensor parallel 2 with sequence parallelism, `cp4` context
parallel 4, `cp4heads` the same with Mamba layers that exchange heads; what is left is data parallel.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from versions import versions

PACKS_PER_STEP = 8
LEARNING_RATE = 1e-4
STALL_SECONDS = 180
BOUNDS = {
    "bf16": {"loss": 2e-3, "grad_norm": 3e-2},
    "fp32": {"loss": 1e-4, "grad_norm": 1e-4},
    "fp8": {"loss": 5e-3, "grad_norm": 6e-2},
}
"""In bf16 a weight moves by 0.4% of itself or not at all, so that sums in another order part ways step by step."""


def main() -> None:
    """Parent: start the processes and compare. Child (under torchrun): train every layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="laptop widths, fp32")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp8"), default="bf16")
    parser.add_argument("--layouts", nargs="+", help="some layouts instead of all; the first is the reference")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train_all(args)
    else:
        start(args)


def layouts(processes: int) -> list[str]:
    """Layouts to run, the reference first."""
    names = ["dp"]
    size = 2
    while size <= processes:
        names += [f"tp{size}", f"tp{size}sp", f"cp{size}", f"cp{size}heads"]
        names += [f"tp2cp{size // 2}sp"] if size > 2 else []
        size *= 2
    return names


def start(args: argparse.Namespace) -> None:
    """Run the layouts one after the other in one group of processes, and judge what came of it."""
    args.out.unlink(missing_ok=True)
    own = [__file__, "--child", "--dtype", args.dtype, "--steps", str(args.steps), "--out", str(args.out)]
    own += ["--layouts", *(args.layouts or layouts(args.processes)), *(["--small"] if args.small else [])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    # Triton multiplies fp32 in TF32 unless it is told otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRITON_F32_DEFAULT": "ieee"}
    failed = subprocess.run(
        [*command, "--nproc-per-node", str(args.processes), *own], check=False, env=environment
    ).returncode
    sys.exit(failed or not json.loads(args.out.read_text())["within_bounds"])


def train_all(args: argparse.Namespace) -> None:
    """One process: train every layout; after each, rank 0 writes what there is, since a run can be cut off."""
    import faulthandler

    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
    if torch.cuda.is_available():
        from shared_gpus import local_rank

        os.environ["LOCAL_RANK"] = str(local_rank(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
    rows: dict[str, dict] = {}
    for name in args.layouts:
        # A layout that hangs says where, in every process.
        faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
        rows[name] = compared(train_one(name, args), rows.get(args.layouts[0]))
        gc.collect()  # megatron-core's parts refer to each other
        torch.cuda.empty_cache()
        if torch.distributed.get_rank() == 0:
            write(rows, args)
    faulthandler.cancel_dump_traceback_later()


def compared(row: dict, reference: dict | None) -> dict:
    """A layout's row with its largest differences from the first layout's."""
    for key in ("loss", "grad_norm"):
        pairs = zip(row[key], (reference or row)[key], strict=True)
        row[f"{key}_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
    name, loss = row["layout"], row["loss"]
    if os.environ.get("RANK") == "0":
        print(
            f"{name:<12} loss {loss[0]:.5f} -> {loss[-1]:.5f}   largest relative difference: "
            f"loss {row['loss_difference']:.1e}  gradient norm {row['grad_norm_difference']:.1e}   "
            f"{row['peak_gib']:.1f} GiB  {row['median_step_seconds'] * 1e3:.0f} ms",
            flush=True,
        )
    return row


def write(rows: dict[str, dict], args: argparse.Namespace) -> None:
    """The result so far."""
    bounds = BOUNDS["fp32" if args.small else args.dtype]
    within = all(row[f"{key}_difference"] <= bound for row in rows.values() for key, bound in bounds.items())
    options = f" --dtype {args.dtype}" + " --small" * args.small + f" --steps {args.steps}"
    processes = int(os.environ["WORLD_SIZE"])
    result = {
        "case": "layouts",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/layouts.py --processes {processes}{options} --layouts " + " ".join(args.layouts),
        "versions": versions(),
        "processes": processes,
        "reference": args.layouts[0],
        "bounds": bounds,
        "within_bounds": within,
        "layouts": rows,
    }
    args.out.write_text(json.dumps(result, indent=1))


def train_one(name: str, args: argparse.Namespace) -> dict:
    """Losses, gradient norms, memory and step time of one layout."""
    import torch
    from gpu_packs import one_configuration_per_kernel, random_pack

    from nemovl_train.config.schema import OptimConfig, ParallelConfig, PrecisionConfig
    from nemovl_train.model.vlm import build_model
    from nemovl_train.parallel.layout import Layout
    from nemovl_train.training.optimizer import Optimizers
    from nemovl_train.training.step import train_step

    sizes = {kind: int(size) for kind, size in re.findall(r"(tp|cp)(\d+)", name)}
    parallel = ParallelConfig(
        tp=sizes.get("tp", 1),
        cp=sizes.get("cp", 1),
        sequence_parallel=name.endswith("sp"),
        mamba_context="head_exchange" if name.endswith("heads") else "state_passing",
    )
    config, shapes = model_and_shapes(small=args.small)
    layout = Layout.create(parallel, config.language)
    cuda = layout.device.type == "cuda"
    if cuda:
        one_configuration_per_kernel()
        torch.cuda.reset_peak_memory_stats()
    plain = args.small or args.dtype == "fp32"
    dtype = torch.float32 if plain else torch.bfloat16
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    backend = "torch" if plain else "te"
    # Two blocks of a tower have no middle.
    precision = PrecisionConfig(fp8="blockwise" if args.dtype == "fp8" and not plain else "none", bf16_blocks=0)
    model = build_model(config, layout, params_dtype=dtype, backend=backend, precision=precision, draw_on=layout.device)
    model.freeze(train=config.parts)
    optim = OptimConfig(lr=LEARNING_RATE, weight_decay=0.01)
    optimizers = Optimizers(model, layout, optim, dtype)
    row: dict = {"layout": name, "loss": [], "grad_norm": [], "seconds": []}
    for step in range(args.steps):
        seeds = range(step * PACKS_PER_STEP, (step + 1) * PACKS_PER_STEP)
        packs = [random_pack(config, seed=seed, **shapes) for seed in seeds[layout.dp_rank :: layout.dp]]
        result = train_step(optimizers, packs, layout, lr=optim.lr, divisor="global")
        row["loss"].append(result.loss)
        row["grad_norm"].append(result.grad_norm)
        row["seconds"].append(result.seconds)
    row["median_step_seconds"] = sorted(row.pop("seconds"))[args.steps // 2]
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    row["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if cuda else "CPU"
    row["dtype"], row["dp"] = str(dtype), layout.dp
    layout.destroy()
    return row


def model_and_shapes(*, small: bool):
    """A VLM with one layer of each kind and two tower blocks, and the documents of its packs."""
    from nemovl_train.config.schema import LanguageConfig, ModelConfig, TokenIds, VisionConfig

    if small:
        from nemovl_train.config.compose import compose_run

        return compose_run("tiny/stage1_sft_16k").model, {
            "lengths": (70, 33, 130),
            "tiles": (2, 0, 4),
            "seq_length": 256,
        }
    # A short vocabulary: drawing 132,096 rows of initial weights would take longer than the training.
    config = ModelConfig(
        name="one_layer_of_each_kind",
        language=LanguageConfig(hybrid_pattern="M-M*-", vocab_size=16384, base_vocab_size=16000),
        vision=VisionConfig(num_layers=2),
        tokens=TokenIds(image=16000, image_start=16001, image_end=16002, video=16009),
    )
    return config, {"lengths": (700, 33, 1300), "tiles": (2, 0, 4), "seq_length": 2048}


if __name__ == "__main__":
    # The library of this checkout, installed or not.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
