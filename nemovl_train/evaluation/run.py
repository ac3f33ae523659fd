"""Held-out evaluation of a stage: loss and greedy exact match per dataset, and a few answers to look at.

Exact match needs no generation. Greedy decoding writes the reference answer if and only if, with the reference fed in,
the most likely token is the reference's at every position from where generation starts through the end-of-turn token.
One forward pass over packed samples therefore scores them all.

Shape suffixes: M supervised positions of a pack, V vocabulary rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.dataset import Dataset
from data_pipelines.loader import heldout_packs
from data_pipelines.media.rules import RenderRules
from data_pipelines.schema import Pack
from data_pipelines.template import NO_TRACE, TRACE_START
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.checkpoint.files import replace_text
from nemovl_train.config.schema import RunConfig
from nemovl_train.evaluation.predictions import write_predictions
from nemovl_train.inference.sampling import most_likely
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.agree import on_first_rank
from nemovl_train.parallel.layout import Layout


class StopAskedError(Exception):
    """Scoring was given up because the run was asked to stop."""


@dataclass
class Score:
    """Sums over one dataset.

    Attributes:
        nats: Cross entropy summed over supervised tokens.
        tokens: Supervised tokens.
        matches: Samples whose greedy answer equals the reference.
        samples: Samples scored.
    """

    nats: float = 0.0
    tokens: int = 0
    matches: int = 0
    samples: int = 0

    def add(self, other: Score) -> None:
        """Add another pack's sums."""
        self.nats += other.nats
        self.tokens += other.tokens
        self.matches += other.matches
        self.samples += other.samples

    def row(self) -> dict[str, float | int | None]:
        """As it stands in `evaluation.json`; None where there is nothing to divide by."""
        return {
            "loss": self.nats / self.tokens if self.tokens else None,
            "exact_match": self.matches / self.samples if self.samples else None,
            "samples": self.samples,
            "supervised_tokens": self.tokens,
        }


def evaluate_stage(
    model: NemotronVL,
    config: RunConfig,
    layout: Layout,
    folder: Path,
    step: int,
    *,
    interrupted: Callable[[], bool],
) -> dict[str, Any] | None:
    """Score every held-out set and write `evaluation.json` and `predictions.json`. Collective.

    Args:
        model: The trained model.
        config: The stage's config; `evaluation` says what to read.
        layout: Owner of the process groups.
        folder: The stage's folder.
        step: Step that is evaluated.
        interrupted: Asked on every rank before each pack; True gives up, and a restart begins again.

    Returns:
        Contents of `evaluation.json`, empty when the config asks for no evaluation; None when interrupted.
    """
    if not config.evaluation.sources:
        return {}
    began = time.perf_counter()
    data = evaluation_data(config)
    tokenizer = TextTokenizer(data.tokenizer)
    model.eval()
    try:
        rows = {
            name: score_source(model, data, name, config, layout, tokenizer, interrupted).row() for name in data.sources
        }
        if interrupted():
            return None
        write_predictions(model, config, data, tokenizer, folder)
    except StopAskedError:
        return None
    finally:
        model.train()
    result = {"step": step, "seconds": time.perf_counter() - began, "sources": rows}
    on_first_rank(lambda: replace_text(folder / "evaluation.json", json.dumps(result, indent=1)))
    return result


def refuse_unreadable_sets(config: RunConfig) -> None:
    """Open every held-out set before a run spends its hours, and read nothing of them.

    Raises:
        UserError: A set is missing, has no such split, or was counted by other rules.
    """
    data = evaluation_data(config)
    if data.sources:
        tokenizer = TextTokenizer(data.tokenizer)
        for source in data.sources.values():
            Dataset.open(source.path, source.split, rules=RenderRules.from_config(data), tokenizer=tokenizer).close()


def evaluation_data(config: RunConfig) -> DataConfig:
    """The run's data rules over the held-out splits, at the evaluation's own pack length."""
    options = config.evaluation
    sources = {name: SourceConfig(path=path, split=options.split) for name, path in options.sources.items()}
    return replace(config.data, sources=sources, seq_length=options.seq_length, packing="sequential", num_workers=0)


def score_source(
    model: NemotronVL,
    data: DataConfig,
    name: str,
    config: RunConfig,
    layout: Layout,
    tokenizer: TextTokenizer,
    interrupted: Callable[[], bool] = lambda: False,
) -> Score:
    """Score one dataset over all data parallel ranks, which have equally many packs. Collective.

    Raises:
        StopAskedError: `interrupted`, asked before every pack, said so.
    """
    total = Score()
    packs: Generator[Pack] = heldout_packs(
        data,
        name,
        tokens_per_tile=config.model.tokens_per_tile,
        split=config.evaluation.split,
        max_samples=config.evaluation.max_samples,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp,
    )
    forced = [tokenizer.encode_text(NO_TRACE), tokenizer.encode_text(TRACE_START)]
    with closing(packs):
        for pack in packs:
            if interrupted():
                raise StopAskedError
            total.add(score_pack(model, pack, layout, forced=forced, eos=config.model.tokens.eos))
    sums = torch.tensor([total.nats, total.tokens, total.matches, total.samples], dtype=torch.float64)
    sums = sums.to(layout.device)
    dist.all_reduce(sums, group=layout.language_groups.dp)
    nats, tokens, matches, samples = sums.tolist()
    return Score(nats, int(tokens), int(matches), int(samples))


@torch.no_grad()
def score_pack(model: NemotronVL, pack: Pack, layout: Layout, *, forced: Sequence[list[int]], eos: int) -> Score:
    """Score the samples of one pack.

    Args:
        model: The model, in evaluation mode.
        pack: Held-out samples.
        layout: Owner of the device.
        forced: Ids that a generation prompt can end with; an answer that starts so was given them.
        eos: Id of the end of a turn; what follows it is not generated either.
    """
    positions = (pack.labels >= 0).nonzero()[:, 0]
    if positions.numel() == 0:
        return Score()
    batch = PackBatch.from_pack(pack, layout)
    logits_MV = model.logits(batch, positions.to(layout.device))
    labels = pack.labels[positions]
    nats = torch.nn.functional.cross_entropy(logits_MV, labels.to(layout.device), reduction="sum")
    right = most_likely(logits_MV, model.sizes.tokens).cpu() == labels
    documents = pack.seq_idx[positions]
    matches = sum(
        _answer_matches(right[documents == d], labels[documents == d], forced, eos) for d in documents.unique().tolist()
    )
    return Score(float(nats), positions.numel(), matches, int(documents.unique().numel()))


def _answer_matches(right: Tensor, labels: Tensor, forced: Sequence[list[int]], eos: int) -> bool:
    """Whether every generated position of every turn of a sample is right; never without the end of a turn."""
    ids = labels.tolist()
    start = 0
    while eos in ids[start:]:
        end = ids.index(eos, start)
        given = max((len(f) for f in forced if ids[start : start + len(f)] == f), default=0)
        if not bool(right[start + given : end + 1].all()):
            return False
        # The newline after the end of a turn is supervised, but generation has stopped there.
        start = end + 2
    return start > 0
