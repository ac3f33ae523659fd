"""Greedy answers to a few held-out questions, with their pictures, for the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.dataset import Dataset, StoredSample
from data_pipelines.media.rules import RenderRules
from data_pipelines.schema import content_items
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.checkpoint.files import explain_disk_errors, replace_text
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import DataError
from nemovl_train.inference.generate import generate
from nemovl_train.inference.prompt import Prompt, build_prompt
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.agree import on_first_rank

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 24
MAX_PROMPT_TOKENS = 1024
MAX_PICTURES = 4


def write_predictions(
    model: NemotronVL, config: RunConfig, data: DataConfig, tokenizer: TextTokenizer, folder: Path
) -> None:
    """Answer the first few questions of every held-out set and write `predictions.json` beside their pictures."""
    rules = RenderRules.from_config(data)
    rows: list[dict[str, Any]] = []
    pictures: dict[str, torch.Tensor] = {}
    for name, source in data.sources.items():
        dataset = Dataset.open(source.path, source.split, rules=rules, tokenizer=tokenizer)
        asked = _questions(dataset, name, config.evaluation.predictions, tokenizer, rules)
        dataset.close()
        answers = generate(
            model,
            [p for _, p in asked],
            max_new_tokens=MAX_NEW_TOKENS,
            video_pruning_rate=data.video_pruning_rate,
        )
        for (sample, prompt), answer in zip(asked, answers, strict=True):
            shown = _pictures(prompt, f"{name}_{sample.record['id']}")
            rows.append(_row(name, sample, tokenizer.decode(answer, skip_special_tokens=True), list(shown)))
            pictures.update(shown)
    on_first_rank(lambda: _write(folder, rows, pictures))


def _questions(
    dataset: Dataset, source: str, count: int, tokenizer: TextTokenizer, rules: RenderRules
) -> list[tuple[StoredSample, Prompt]]:
    """The first `count` samples that can be asked."""
    asked = []
    for index in range(min(count, len(dataset))):
        try:
            stored = dataset.read(index)
            prompt = build_prompt(stored.record, stored.media, tokenizer, rules)
        except (DataError, OSError) as error:
            # The scores leave such a sample out as well; a stage that is trained must not hang on it.
            log.warning("no prediction for sample %r of %s: %s", dataset.key(index), source, error)
            continue
        # The report shows questions whole, and nobody would read those: long documents are left to exact match.
        if len(prompt.input_ids) <= MAX_PROMPT_TOKENS:
            asked.append((stored, prompt))
    return asked


def _row(source: str, sample: StoredSample, answer: str, pictures: list[str]) -> dict[str, Any]:
    reference = _text(sample.record["messages"][-1])
    return {
        "source": source,
        "key": str(sample.record["id"]),
        "question": "\n".join(_text(m) for m in sample.record["messages"][:-1]),
        "reference": reference,
        "prediction": answer.strip(),
        "correct": answer.strip() == reference.strip(),
        "images": pictures,
    }


def _text(message: Mapping[str, Any]) -> str:
    return " ".join(item["text"] for item in content_items(message) if item["type"] == "text")


def _pictures(prompt: Prompt, stem: str) -> dict[str, torch.Tensor]:
    """First tiles of a prompt by the name of the file they go to, [3, P, P] uint8."""
    safe = stem.replace("/", "_")
    return {f"predictions/{safe}_{i}.png": tile for i, tile in enumerate(prompt.tiles[:MAX_PICTURES])}


def _write(folder: Path, rows: list[dict[str, Any]], pictures: dict[str, torch.Tensor]) -> None:
    with explain_disk_errors(folder):
        (folder / "predictions").mkdir(exist_ok=True)
        for name, tile in pictures.items():
            Image.fromarray(tile.permute(1, 2, 0).numpy()).save(folder / name)
    replace_text(folder / "predictions.json", json.dumps(rows, indent=1))
