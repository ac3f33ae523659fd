"""Evaluation of an exported folder: what `nemovl eval` runs.

    from nemovl_train.evaluation.exported import evaluate
    from nemovl_train.evaluation.sets import HeldoutSet

    evaluate(Path("runs/tiny/hf"), sets=[HeldoutSet("digits", "runs/tiny/data/digits_read", ("exact_match",))])

Answers are generated, stripped of their reasoning trace and scored; the loss of the references is measured as well
where a set has some in the model's own template. Samples that cannot be asked are left out and counted.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.dataset import Dataset, read_info
from data_pipelines.schema import content_items
from nemovl_train.config.schema import EvalConfig, RunConfig
from nemovl_train.evaluation.benchmarks import BenchmarkQuestion, ocrbench, read_benchmark
from nemovl_train.evaluation.metrics import METRICS, scored_answer
from nemovl_train.evaluation.run import score_source
from nemovl_train.evaluation.sets import BENCHMARKS, HeldoutSet
from nemovl_train.exceptions import DataError
from nemovl_train.inference.answer import Asked, Decoding, ExportedModel
from nemovl_train.model.vlm import NemotronVL

log = logging.getLogger(__name__)

ASKED_AT_ONCE = 32
"""Questions whose pixels are in memory together."""
ALL = 2**31
"""More questions than a set has."""
MAX_SHOWN = 200
"""Most answers of a set that are kept in the results."""


@dataclass(frozen=True)
class _Item:
    """A question that was rendered, and what it is scored against."""

    key: str
    asked: Asked
    references: tuple[str, ...]
    group: str


def evaluate(
    folder: Path,
    *,
    sets: Sequence[HeldoutSet] = (),
    benchmarks: Sequence[tuple[str, Path]] = (),
    decoding: Decoding | None = None,
    think: bool = False,
    max_samples: int | None = None,
    seq_length: int = 16384,
) -> dict[str, Any]:
    """Answer held-out sets and benchmarks, and score the answers.

    Args:
        folder: Exported folder.
        sets: Dataset folders.
        benchmarks: (name, folder) of local copies of public benchmarks.
        decoding: How answers are written; greedy and at most 128 tokens when None.
        think: Turn reasoning on for every question.
        max_samples: Most questions of each set.
        seq_length: Tokens of the packs that the loss is measured in; longer samples have no loss.

    Returns:
        One JSON document: `model`, `decoding`, `think`, `seconds`, and under `sources` for every set its `samples`,
        `left_out`, `metrics` (means in [0, 1]), `groups`, `loss` and `answers`.

    Raises:
        UserError: A folder, set or benchmark that cannot be used.
    """
    decoding = decoding or Decoding()
    exported, began = ExportedModel(folder), time.perf_counter()
    stop = exported.stop_ids(decoding.stop)
    opened = [(heldout, _open(exported, heldout, seq_length)) for heldout in sets]
    sources: dict[str, Any] = {}
    with exported.loaded() as model:

        def answers(asked: Sequence[Asked]) -> list[str]:
            return exported.answers(model, asked, decoding, stop)

        for heldout, data in opened:
            questions = _of_dataset(exported, heldout, max_samples, think)
            row = _score(questions, answers, {name: METRICS[name] for name in heldout.metrics})
            sources[heldout.name] = row | _loss(model, exported, heldout.name, data, heldout.split, max_samples)
        for name, path in benchmarks:
            questions = _of_benchmark(exported, read_benchmark(name, path), max_samples, think)
            sources[name] = _score(questions, answers, {BENCHMARKS[name]: METRICS.get(BENCHMARKS[name])})
    options = {"sampling": asdict(decoding.sampling), "max_new_tokens": decoding.max_new_tokens}
    options |= {"stop": list(decoding.stop), "video_pruning_rate": decoding.video_pruning_rate}
    seconds = time.perf_counter() - began
    return {"model": str(folder), "decoding": options, "think": think, "seconds": seconds, "sources": sources}


def _open(exported: ExportedModel, heldout: HeldoutSet, seq_length: int) -> DataConfig:
    """Rules of the exported folder over one set; refuses a set that was counted by others."""
    # A set may have been counted for training with fewer tokens of its videos: its loss is measured so, answers are
    # written at the rate that was asked for.
    rate = read_info(heldout.path)["rules"].get("video_pruning_rate", 0.0)
    rules = replace(exported.rules, video_pruning_rate=rate)
    tokenizer = exported.tokenizer
    Dataset.open(heldout.path, heldout.split, rules=rules, tokenizer=tokenizer).close()
    return DataConfig(
        sources={heldout.name: SourceConfig(path=heldout.path, split=heldout.split)},
        tokenizer=str(tokenizer.path.parent),
        seq_length=seq_length,
        packing="sequential",
        **asdict(rules),
    )


def _loss(
    model: NemotronVL, exported: ExportedModel, name: str, data: DataConfig, split: str, max_samples: int | None
) -> dict[str, Any]:
    options = EvalConfig(split=split, max_samples=max_samples or ALL, seq_length=data.seq_length)
    config = RunConfig(model=exported.config, data=data, evaluation=options)
    score = score_source(model, data, name, config, model.layout, exported.tokenizer).row()
    return {"loss": score["loss"], "supervised_tokens": score["supervised_tokens"]}


def _of_dataset(
    exported: ExportedModel, heldout: HeldoutSet, max_samples: int | None, think: bool
) -> Iterator[_Item | DataError]:
    dataset = Dataset.open(heldout.path, heldout.split)
    try:
        for index in range(min(len(dataset), max_samples or len(dataset))):
            try:
                stored = dataset.read(index)
                asked = exported.asked(_thinking(stored.record, think), stored.media)
            except (DataError, OSError) as error:
                yield DataError(f"{dataset.key(index)} of {heldout.name}: {error}")
                continue
            reference = scored_answer(_text(stored.record["messages"][-1]))
            yield _Item(str(stored.record["id"]), asked, (reference,), "")
    finally:
        dataset.close()


def _of_benchmark(
    exported: ExportedModel, questions: Iterator[BenchmarkQuestion], max_samples: int | None, think: bool
) -> Iterator[_Item | DataError]:
    for question in itertools.islice(questions, max_samples):
        record, media = question.record()
        try:
            asked = exported.asked(_thinking(record, think), media)
        except DataError as error:
            yield DataError(f"{question.key}: {error}")
            continue
        yield _Item(question.key, asked, question.references, question.group)


def _thinking(record: dict[str, Any], think: bool) -> dict[str, Any]:
    """The record with reasoning switched on by its system text, from which the template takes the switch out."""
    if not think:
        return record
    messages = record["messages"]
    system = _text(messages[0]) if messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return {**record, "messages": [{"role": "system", "content": f"{system}/think"}, *rest]}


def _text(message: dict[str, Any]) -> str:
    return "".join(item["text"] for item in content_items(message) if item["type"] == "text")


def _score(
    items: Iterator[_Item | DataError],
    answers: Callable[[Sequence[Asked]], list[str]],
    metrics: dict[str, Callable[[str, Sequence[str]], float] | None],
) -> dict[str, Any]:
    """Ask in batches and average; a metric without a function of its own is OCRBench's, which looks at the group."""
    rows: list[dict[str, Any]] = []
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    left_out = 0
    for batch in itertools.batched(items, ASKED_AT_ONCE):
        usable = [item for item in batch if isinstance(item, _Item)]
        for item in batch:
            if isinstance(item, DataError):
                log.warning("left out: %s", item)
                left_out += 1
        for item, text in zip(usable, answers([item.asked for item in usable]), strict=True):
            said = scored_answer(text)
            scores = {
                name: ocrbench(said, item.references, item.group) if metric is None else metric(said, item.references)
                for name, metric in metrics.items()
            }
            groups[item.group].append(scores)
            rows.append({"key": item.key, "answer": text, "references": list(item.references), **scores})
    every = [scores for found in groups.values() for scores in found]
    named = {name: found for name, found in groups.items() if name}
    return {
        "samples": len(every),
        "left_out": left_out,
        "metrics": _means(every, list(metrics)),
        "groups": {name: {"samples": len(found), **_means(found, list(metrics))} for name, found in named.items()},
        "answers": rows[:MAX_SHOWN],
    }


def _means(rows: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, float | None]:
    return {name: sum(row[name] for row in rows) / len(rows) if rows else None for name in names}
