"""Training losses in FP8 and in bf16 on the same data and initial weights.

    python benchmarks/fp8_curves.py --out O.json                 # one H100, full width, about three minutes
    python benchmarks/fp8_curves.py --small --out O.json         # CPU, laptop width, fp32: tries the program

Data can be learned and have a known floor: every token has eight successors with fixed odds, the same all along, and a
part of the documents repeat their first half, which only a model that looks back can use. A third run, bf16 from other
initial weights, says what two runs differ by in any case. Written after every run: losses of all steps, their mean over
the last quarter, and its difference from bf16's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

SUCCESSORS = 8
RUNS = {"bf16": ("none", 0), "fp8": ("blockwise", 0), "bf16_other_weights": ("none", 1)}
"""Name of a run: its FP8 option, and what is added to the seed of the initial weights."""
REPEATED = 0.5
"""Share of the documents whose second half is their first."""


def main() -> None:
    """All runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", default=[], help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--packs", type=int, default=2, help="packs of a step")
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--pattern", default="M-M*-M-", help="layers; those at both ends are never FP8")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests" / "gpu")]
    import torch

    from nemovl_train.config.schema import ParallelConfig
    from nemovl_train.parallel.layout import Layout

    if args.small:
        args.seq_length, args.steps = 256, min(args.steps, 20)
    elif torch.cuda.is_available():
        from triton_choices import use_choices

        use_choices()
    layout = Layout.create(ParallelConfig())
    data = Chains(vocabulary=256 if args.small else 4096, seed=7)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and not args.small else "CPU",
        "floor_without_repeats": data.entropy(),
        "runs": {},
    }
    for name in args.runs or RUNS:
        result["runs"][name] = train(name, args, layout, data)
        compare(result["runs"])
        args.out.write_text(json.dumps(result, indent=1))
        print(name, {k: v for k, v in result["runs"][name].items() if k != "losses"}, flush=True)
    layout.destroy()


def train(name: str, args: argparse.Namespace, layout: Any, data: Chains) -> dict[str, Any]:
    """One run from the first step to the last."""
    import torch

    from nemovl_train.config.schema import OptimConfig, PrecisionConfig
    from nemovl_train.model.vlm import build_model
    from nemovl_train.training.lr import learning_rate
    from nemovl_train.training.optimizer import Optimizers
    from nemovl_train.training.step import train_step

    fp8, other = RUNS[name]
    model = build_model(
        sizes(args),
        layout,
        params_dtype=torch.float32 if args.small else torch.bfloat16,
        backend="torch" if args.small else "te",
        precision=PrecisionConfig(fp8="none" if args.small else fp8),
        seed=1234 + other,
        draw_on=layout.device,
    )
    model.freeze(train=("language",))
    optim = OptimConfig(lr=args.lr, min_lr=args.lr / 10, beta2=0.95, weight_decay=0.1)
    optimizers = Optimizers(model, layout, optim, torch.float32 if args.small else torch.bfloat16)
    losses, seconds = [], []
    for step in range(args.steps):
        packs = [data.pack(sizes(args), args.seq_length, step * args.packs + i) for i in range(args.packs)]
        lr = learning_rate(optim, step, args.steps)
        result = train_step(optimizers, packs, layout, lr=lr, divisor=optim.loss_divisor)
        losses.append(result.loss)
        seconds.append(result.seconds)
        if step % 20 == 0:
            print(f"{name}: step {step} loss {result.loss:.4f}, {result.seconds:.2f} s", flush=True)
    last = losses[-max(args.steps // 4, 1) :]
    row = {"losses": losses, "mean_of_last_quarter": sum(last) / len(last)}
    row["median_step_seconds"] = sorted(seconds)[len(seconds) // 2]
    if layout.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def compare(runs: dict[str, dict[str, Any]]) -> None:
    """Adds to each run how far its last quarter is from bf16's, relative."""
    if "bf16" in runs:
        base = runs["bf16"]["mean_of_last_quarter"]
        for row in runs.values():
            row["above_bf16"] = row["mean_of_last_quarter"] / base - 1


def sizes(args: argparse.Namespace) -> Any:
    """The 12B model's widths, few layers; or a laptop's."""
    from nemovl_train.config.schema import LanguageConfig, ModelConfig, TokenIds

    rows = 256 if args.small else 4096
    widths: dict[str, Any] = {}
    if args.small:
        widths = {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16}
        widths |= {"ffn_hidden_size": 160, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_state_dim": 16}
        widths |= {"mamba_num_groups": 2, "chunk_size": 32}
    return ModelConfig(
        name="fp8_curves",
        parts=("language",),
        language=LanguageConfig(hybrid_pattern=args.pattern, vocab_size=rows + 128, base_vocab_size=rows, **widths),
        tokens=TokenIds(image=rows, image_start=rows + 1, image_end=rows + 2, video=rows + 9),
    )


class Chains:
    """Documents in which each token decides the odds of the next.

    Args:
        vocabulary: Tokens there are.
        seed: Seed of the successors, and with a pack's number of its documents.
    """

    def __init__(self, vocabulary: int, seed: int) -> None:
        import numpy as np

        self._seed, self._vocabulary = seed, vocabulary
        self._successors = np.random.default_rng(seed).integers(0, vocabulary, (vocabulary, SUCCESSORS))
        odds = 1.0 / np.arange(1, SUCCESSORS + 1)
        self._odds = odds / odds.sum()

    def entropy(self) -> float:
        """Nats a token of documents that do not repeat, once the successors are known."""
        import numpy as np

        return float(-(self._odds * np.log(self._odds)).sum())

    def pack(self, config: Any, length: int, number: int) -> Any:
        """Pack of this number: four documents of one length."""
        import numpy as np
        import torch
        from gpu_packs import random_pack

        random, each = np.random.default_rng([self._seed, number]), length // 4
        chosen = random.choice(SUCCESSORS, size=(each, 4), p=self._odds)
        tokens = np.empty((each, 4), np.int64)
        tokens[0] = random.integers(0, self._vocabulary, 4)
        for place in range(1, each):
            tokens[place] = self._successors[tokens[place - 1], chosen[place]]
        repeats = random.random(4) < REPEATED
        tokens[each // 2 :, repeats] = tokens[: each - each // 2, repeats]
        ids = torch.from_numpy(tokens.T.copy())
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        pack = random_pack(config, lengths=(each,) * 4, tiles=(0,) * 4, seq_length=length)
        return replace(pack, input_ids=ids.flatten(), labels=labels.flatten())


if __name__ == "__main__":
    main()
