"""What checkpoints cost a run: steps without saves, with saves in the background, and with saves that are waited for.

On a CPU, with 24 million parameters:

    python benchmarks/async_save.py --out benchmarks/results/async_save_cpu.json

On one GPU, with 1.0 billion parameters (weights and optimizer state together 14 GB, as much host memory, and twice
that on the disk), about two minutes:

    python benchmarks/async_save.py --size 1b --rounds 1 --modes none background none \\
        --work /scratch/async_save --out async_save.json

A save begins in the middle of every interval, so that all it does to the steps beside it (copies, hashing, writing,
reading back) falls into the time that is measured. Every mode runs on the same packs, in turn, the rounds interleaved
so that a drift of the machine hits all of them. The result is written after every mode.
"""

import argparse
import json
import platform
import resource
import shutil
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from versions import versions

from nemovl_train.checkpoint.retention import Keep
from nemovl_train.checkpoint.saving import Saver
from nemovl_train.config.schema import (
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProjectorConfig,
    TokenIds,
    VisionConfig,
)
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.step import train_step

# isort: split
from data_pipelines.schema import Pack

MODES = ("none", "background", "waited for")
SIZES = {
    "24m": {"hidden_size": 256, "ffn_hidden_size": 1024, "heads": 8, "mamba_heads": 8, "layers": 4, "tokens": 1024},
    "1b": {"hidden_size": 2048, "ffn_hidden_size": 8192, "heads": 16, "mamba_heads": 64, "layers": 8, "tokens": 8192},
}
PACKS = {"24m": 2, "1b": 4}


def model_config(size: dict[str, int]) -> ModelConfig:
    """Language model of the released pattern's layers; the tower plays no part in what a save costs."""
    language = LanguageConfig(
        hidden_size=size["hidden_size"],
        hybrid_pattern="M-*-" * size["layers"],
        num_attention_heads=size["heads"],
        num_query_groups=8,
        head_dim=size["hidden_size"] // size["heads"],
        ffn_hidden_size=size["ffn_hidden_size"],
        mamba_num_heads=size["mamba_heads"],
        mamba_head_dim=64,
        mamba_state_dim=128 if size["hidden_size"] > 1000 else 32,
        mamba_num_groups=8,
        vocab_size=32768,
        base_vocab_size=32768,
    )
    return ModelConfig(
        name="async-save",
        parts=("language",),
        language=language,
        vision=VisionConfig(),
        projector=ProjectorConfig(),
        tokens=TokenIds(),
    )


def make_pack(length: int, vocabulary: int, number: int) -> Pack:
    """Random tokens in one document: what they are does not change what a save costs."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, vocabulary, (length,), generator=generator)
    return Pack(
        input_ids=ids,
        labels=ids.roll(-1),
        loss_weight=torch.ones(length),
        position_ids=torch.arange(length),
        seq_idx=torch.zeros(length, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen=length,
        tiles=torch.zeros(0, 3, 512, 512, dtype=torch.uint8),
        tile_token_start=torch.zeros(0, dtype=torch.int64),
        media_of_tile=torch.zeros(0, dtype=torch.int32),
        is_thumbnail=torch.zeros(0, dtype=torch.bool),
        frame_time=torch.zeros(0),
        sample_keys=("random",),
        dataset_ids=("random",),
        stats={"tokens": length, "supervised_tokens": length, "visual_tokens": 0},
        index=number,
    )


class Bench:
    """One model that is trained on in every mode."""

    def __init__(self, size: str, tokens: int, work: Path, every: int) -> None:
        cuda = torch.cuda.is_available()
        if cuda:
            from triton_choices import use_choices

            use_choices()
        self.layout = Layout.create(ParallelConfig())
        self.dtype = torch.bfloat16 if cuda else torch.float32
        config = model_config(SIZES[size])
        self.model = build_model(
            config, self.layout, params_dtype=self.dtype, seed=1, draw_on=self.layout.device, backend="auto"
        )
        self.optimizers = Optimizers(self.model, self.layout, OptimConfig(lr=1e-5), self.dtype)
        self.packs = [make_pack(tokens, config.language.vocab_size, number) for number in range(PACKS[size])]
        self.work, self.every, self.step = work, every, 0

    def run(self, mode: str, steps: int) -> dict[str, Any]:
        """Seconds of `steps` steps in a mode; a save begins in the middle of every interval."""
        shutil.rmtree(self.work, ignore_errors=True)
        saver = Saver(self.work, "bench", Keep(last=1), in_background=mode != "waited for")
        stalls, marks = [], [self._now(reset_peak=True)]
        published = None
        for number in range(1, steps + 1):
            train_step(self.optimizers, self.packs, self.layout, lr=1e-5, divisor="global")
            self.step += 1
            if mode != "none" and not saver.idle and not saver.busy and saver.advance() is not None:
                published = number
            if mode != "none" and number % self.every == self.every // 2:
                before = self._now()
                saver.start(self.step, model=self.model, optimizer=self.optimizers, state={})
                if mode == "waited for":
                    saver.finish()
                stalls.append(self._now() - before)
            marks.append(self._now())
        done_in_time = saver.idle
        saver.finish()
        each = [after - before for before, after in pairwise(marks)]
        return {
            "mode": mode,
            "seconds": marks[-1] - marks[0],
            "median_step_seconds": statistics.median(each),
            "slowest_step_seconds": max(each),
            "stalls": stalls,
            "published_after_step": published,
            "done_within_the_interval": done_in_time,
            "save_seconds": saver.seconds,
            "seconds_with_the_last_save": self._now() - marks[0],
            "host_stage_bytes": saver.stage_bytes,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }

    def checkpoint_bytes(self) -> int:
        """Size of the newest checkpoint; 0 after a mode without saves."""
        return sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())

    def _now(self, *, reset_peak: bool = False) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if reset_peak:
                torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by mode, and what each kind of save costs of the time without saves, as far as it was measured."""
    modes = list(dict.fromkeys(row["mode"] for row in rounds))
    medians = {mode: statistics.median(row["seconds"] for row in rounds if row["mode"] == mode) for mode in modes}
    found: dict[str, Any] = {"seconds": medians}
    if "none" in medians:
        found["cost"] = {mode: medians[mode] / medians["none"] - 1 for mode in modes if mode != "none"}
    saved = [row for row in rounds if row["mode"] == "background"]
    if saved:
        found["stall_share"] = statistics.median(sum(row["stalls"]) / row["seconds"] for row in saved)
        found["checkpoint_bytes"] = max(row["checkpoint_bytes"] for row in saved)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="24m")
    parser.add_argument("--steps", type=int, default=50, help="steps of a mode in a round")
    parser.add_argument("--every", type=int, default=50, help="steps between two saves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of a round, in this order")
    parser.add_argument("--warm", type=int, default=2, help="steps before the first that counts")
    parser.add_argument("--tokens", type=int, help="tokens of a pack instead of the size's")
    parser.add_argument("--work", type=Path, default=Path("runs/async_save"), help="where checkpoints go")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began = time.perf_counter()
    bench = Bench(args.size, args.tokens or SIZES[args.size]["tokens"], args.work, args.every)
    print(f"built in {time.perf_counter() - began:.0f} s: {bench.optimizers.num_parameters():,} parameters", flush=True)
    bench.run("none", args.warm)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/async_save.py --size {args.size} --steps {args.steps} --every {args.every}",
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "parameters": bench.optimizers.num_parameters(),
        "dtype": str(bench.dtype),
        "tokens_of_a_step": sum(len(pack.input_ids) for pack in bench.packs),
        "steps": args.steps,
        "every": args.every,
    }
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        for mode in args.modes:
            rounds.append(bench.run(mode, args.steps) | {"checkpoint_bytes": bench.checkpoint_bytes()})
            result |= summary(rounds)
            result["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            args.out.write_text(json.dumps({**result, "rounds": rounds}, indent=1) + "\n")
            print(f"{time.perf_counter() - began:4.0f} s  {json.dumps(rounds[-1])}", flush=True)
    shutil.rmtree(args.work, ignore_errors=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
