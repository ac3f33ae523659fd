"""The five stages of the paper's schedule, a few real steps each: recipe, launcher, data, checkpoint, next stage.

    python benchmarks/stage_steps.py --gpus 2 --out O.json           # 12B widths, true lengths, few layers
    python benchmarks/stage_steps.py --gpus 2 --small --out O.json   # CPU ranks, laptop widths, lengths over 32

Every stage is one `nemovl launch torchrun recipe=nano_12b_v2_vl/STAGE ...` that starts from the weights of the stage
before, the first one from random weights. Overrides change depth, steps, packs of a step and, on two GPUs, the layout;
lengths, blends, packing, loss, optimizer and recomputation are the recipe's. Data and tokenizer are made first
(`stage_data.py`); the vocabulary has its full size.

Beside each measurement stands the plan of the same overrides with the packs that came. The file is written after every
stage. A stage that fails leaves its error there, and the next one starts from random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from versions import versions

HERE = Path(__file__).resolve().parent
GIB = 2**30
SHORTER = 32
"""What `--small` divides lengths by."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        name: Recipe and folder.
        packs: Packs of a step.
        on_two: Layout on two GPUs; on four the recipe's own.
    """

    name: str
    packs: int
    on_two: tuple[str, ...]


TP2 = ("parallel.tp=2", "parallel.cp=1", "parallel.sequence_parallel=true")
CP2 = ("parallel.tp=1", "parallel.cp=2", "parallel.sequence_parallel=false")
STAGES = (
    Stage(name="stage0_projector_warmup", packs=2, on_two=TP2),
    Stage(name="stage1_sft_16k", packs=2, on_two=TP2),
    Stage(name="stage2_video_sft_49k", packs=2, on_two=TP2),
    Stage(name="stage3_code_recovery_49k", packs=2, on_two=(*CP2, "recompute.language=selective")),
    Stage(name="stage4_long_context_300k", packs=1, on_two=(*CP2, "optim.states=lean")),
)
PATTERNS = {2: "M*-", 4: "M-M-M-M*-"}
"""By GPUs: one layer of each kind, which leaves two room for a Mamba layer of 311,296 tokens; or the pattern's unit."""


def main() -> None:
    """Make the data, run the stages, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=(2, 4), default=2)
    parser.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="some, by number or name")
    parser.add_argument(
        "--pattern", help=f"language layers (default: {PATTERNS[2]} on two GPUs, {PATTERNS[4]} on four)"
    )
    parser.add_argument("--vision-layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more overrides, for all stages")
    parser.add_argument("--limit", type=float, default=200, help="seconds that a stage may take")
    parser.add_argument("--small", action="store_true", help="laptop widths, plain PyTorch, CPU")
    parser.add_argument("--root", type=Path, help="folder for data and runs; the roomiest temporary one by default")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    chosen = [s for i, s in enumerate(STAGES) if not args.stages or str(i) in args.stages or s.name in args.stages]
    root = Path(tempfile.mkdtemp(prefix="stage-steps-", dir=args.root or roomiest()))
    os.environ |= {"NEMOVL_DATA": str(root / "data"), "NEMOVL_MODELS": str(root / "models")}
    result: dict[str, Any] = {
        "case": "stage_steps",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "device": f"{args.gpus} x {device(args)}",
        "versions": versions(),
    }
    try:
        result |= {"data_seconds": round(make_data(chosen, args), 1), "rows": []}
        parent: Path | None = None
        for stage in chosen:
            row = run_stage(stage, args, root, parent)
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1))
            print(" ".join(f"{key}={value}" for key, value in row.items() if not isinstance(value, dict)), flush=True)
            if parent is not None:
                shutil.rmtree(parent / "checkpoints")
            parent = None if "failed" in row else root / "runs/nano_12b_v2_vl" / stage.name
    finally:
        shutil.rmtree(root)
    sys.exit(any("failed" in row for row in result["rows"]))


def roomiest() -> Path:
    """A checkpoint of billions of parameters wants room and speed: shared memory where there is more of it."""
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    return max((place for place in places if place.is_dir()), key=lambda place: shutil.disk_usage(place).free)


def overrides(stage: Stage, args: argparse.Namespace) -> list[str]:
    """What is changed in a stage's recipe."""
    own = ["cluster=h100_x4", *stage.on_two, "cluster.gpus=2"] if args.gpus == 2 else ["cluster=h100_x4"]
    own += [f"trainer.steps={args.steps}", f"trainer.global_batch={stage.packs}", "logging.every_steps=1"]
    own += ["data.num_workers=0"]
    if args.small:
        plain = [text for text in own if not text.startswith("optim.states")]
        lengths = {"0": 16384, "1": 16384, "2": 49152, "3": 49152, "4": 311296}
        small = ["model=tiny", "precision=fp32", "optim=adamw", "data.tile_size=64", "data.max_seqlen_bucket=32"]
        return [*plain, *small, f"data.seq_length={lengths[stage.name[5]] // SHORTER}", *args.set]
    deep = [
        f"model.language.hybrid_pattern={args.pattern or PATTERNS[args.gpus]}",
        f"model.vision.num_layers={args.vision_layers}",
    ]
    states = [] if any(text.startswith("optim.states") for text in own) else ["optim.states=bf16_moments"]
    return [*own, *deep, *states, *args.set]


def compose(stage: Stage, args: argparse.Namespace) -> Any:
    """The stage's config."""
    from nemovl_train.config.compose import compose_run

    return compose_run(f"nano_12b_v2_vl/{stage.name}", overrides(stage, args))


def make_data(stages: list[Stage], args: argparse.Namespace) -> float:
    """Write the tokenizer and every source that the stages name; returns the seconds it took."""
    from stage_data import SHAPES, kind_of, write_source, write_tokenizer

    from data_pipelines.media.rules import RenderRules

    began = time.perf_counter()
    words: list[str] = []
    written: dict[str, Path] = {}
    for stage in stages:
        config = compose(stage, args)
        tokenizer = Path(config.data.tokenizer)
        words = words or write_tokenizer(tokenizer, rows=config.model.language.base_vocab_size)
        for name, source in config.data.sources.items():
            kind, folder = kind_of(name), Path(source.path)
            if folder.exists():
                continue
            if kind in written:  # the same samples under another name
                shutil.copytree(written[kind], folder)
                continue
            shape = SHAPES[kind].divided(SHORTER) if args.small else SHAPES[kind]
            write_source(folder, shape, words, tokenizer=tokenizer, rules=RenderRules.from_config(config.data))
            written[kind] = folder
    return time.perf_counter() - began


def run_stage(stage: Stage, args: argparse.Namespace, root: Path, parent: Path | None) -> dict[str, Any]:
    """Launch one stage, and compare what it wrote with its plan."""
    changes = [*overrides(stage, args), f"run.root={root / 'runs'}"]
    changes += [] if parent else ["trainer.init_from=null"]
    command = [sys.executable, "-m", "nemovl_train.cli", "launch", "torchrun", f"recipe=nano_12b_v2_vl/{stage.name}"]
    command += [*changes, "--nproc", str(args.gpus), "--caches", str(root / "caches")]
    peaks = root / "peaks" / stage.name
    peaks.mkdir(parents=True)
    began = time.perf_counter()
    code, log = launch(command, environment(peaks), root / f"{stage.name}.log", args.limit)
    row: dict[str, Any] = {
        "stage": stage.name,
        "starts_from": parent.name if parent else "random weights",
        "wall_seconds": round(time.perf_counter() - began, 1),
        "command": f"nemovl {shlex.join(command[3:])}".replace(str(root), "ROOT"),
    }
    folder = root / "runs/nano_12b_v2_vl" / stage.name
    metrics, record = folder / "metrics.jsonl", folder / "handover.json"
    if record.is_file():
        row["parts_as_before"] = json.loads(record.read_text())["unchanged"]
    steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    if steps:
        row |= measured(steps, args.gpus) | predicted(compose(stage, args), steps)
        row |= memory_of(peaks, row)
    if code != 0 or not steps or not row["finite"]:
        row |= {"failed": f"exit code {code}", "log": log[-3000:]}
    return row


def environment(peaks: Path) -> dict[str, str]:
    """Variables of a launch."""
    paths = [str(HERE / "started"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NEMOVL_BENCHMARK_PEAKS": str(peaks)}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, **own}


def launch(command: list[str], environment: dict[str, str], log: Path, limit: float) -> tuple[int, str]:
    """Run a command to its end, or for so many seconds: exit code and what it printed."""
    with log.open("w") as file:
        child = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            # Twice, as an impatient person would: the second one ends the processes at once.
            for number in (signal.SIGINT, signal.SIGINT):
                child.send_signal(number)
                time.sleep(2)
            code = child.wait(60)
    return code, log.read_text(errors="replace")


def measured(steps: list[dict[str, Any]], gpus: int) -> dict[str, Any]:
    """Numbers of the stage's own metrics. Rates are those of `typical`."""
    step = typical(steps)
    return {
        "losses": [step["loss"] for step in steps],
        "finite": all(step["applied"] and math.isfinite(step["loss"] or math.nan) for step in steps),
        "first_step_seconds": round(steps[0]["step_seconds"], 3),
        "step_seconds": round(step["step_seconds"], 4),
        "tokens_per_second_per_gpu": round(step["tokens"] / step["step_seconds"] / gpus, 1),
        "mfu": step.get("mfu"),
        "data_seconds": round(step["data_seconds"], 2),
        "tokens": [step["tokens"] for step in steps],
        "tiles": [step["tiles"] for step in steps],
        "fill": round(sum(step["fill"] for step in steps) / len(steps), 4),
    }


def typical(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The fullest step but the first, which compiles kernels; of equally full ones the last."""
    return max(steps[1:] or steps, key=lambda step: (step["tokens"], step["step"]))


def predicted(config: Any, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan of the same config, with the packs of the timed step for time, of the one with most tiles for memory."""
    from nemovl_train.plan.memory import memory
    from nemovl_train.plan.planner import make_plan
    from nemovl_train.plan.timing import step_time

    plan = make_plan(config)
    packs = config.trainer.global_batch
    usual, fullest = (load_of(config, step) for step in (typical(steps), max(steps, key=lambda step: step["tiles"])))
    seconds = step_time(config, plan.grid, usual, plan.gpu, packs=math.ceil(packs / plan.grid.dp))
    peak = memory(config, plan.grid, fullest)
    return {
        "planned_seconds": round(seconds.total, 4),
        "planned_gib": round(peak.total / GIB, 2),
        "planned_parts": {
            "seconds": {name: round(value, 4) for name, value in seconds.components().items()},
            "gib": {name: round(value / GIB, 2) for name, value in peak.components().items()},
            "recipe_alone": {"step_seconds": plan.time.total, "gib": plan.memory.total / GIB, "fits": plan.fits},
        },
    }


def load_of(config: Any, step: dict[str, Any]) -> Any:
    """The average pack of a step."""
    from nemovl_train.plan.load import PackLoad

    packs = config.trainer.global_batch
    samples = max(round(step["samples"] / packs), 1)
    return PackLoad(
        seq_length=config.data.seq_length,
        documents=(round(step["tokens"] / packs / samples),) * samples,
        samples=samples,
        tiles=math.ceil(step["tiles"] / packs),
        head_tokens=round(step["supervised_tokens"] / packs),
    )


def memory_of(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The largest peaks over the ranks, and the errors of the plan; nothing without GPUs."""
    peaks = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not peaks:
        return {}
    most = {f"{key}_gib": round(max(peak[key] for peak in peaks) / GIB, 2) for key in peaks[0]}
    return {
        **most,
        "memory_error": round(row["planned_gib"] / most["allocated_gib"] - 1, 3),
        "time_error": round(row["planned_seconds"] / row["step_seconds"] - 1, 3),
    }


def device(args: argparse.Namespace) -> str:
    """Name of the GPUs."""
    if args.small:
        return "CPU"
    line = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[0]


if __name__ == "__main__":
    main()
