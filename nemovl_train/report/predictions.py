"""Sample predictions: one card a sample, with the answer of every stage under it.

A sample is the same in every stage, so its picture is embedded once and the answers can be read as a sequence.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from nemovl_train.report.collect import Stage
from nemovl_train.report.formats import clip

MAX_CARDS_PER_SOURCE = 8
MAX_SIDE = 640  # pixels of an embedded image
TINY_SIDE = 160  # images up to this side are enlarged as they are, pixel by pixel
SHOWN_SIDE = 208  # pixels that a single tiny image is enlarged to
SHOWN_SIDE_OF_MANY = 104
SHORT_TEXT, LONG_TEXT = 280, 6000


@dataclass(frozen=True)
class Picture:
    """An embedded image: data URI, size on screen in CSS pixels, and whether its pixels are shown as squares."""

    uri: str
    width: int
    height: int
    tiny: bool


@dataclass(frozen=True)
class Answer:
    """What one stage answered; `correct` is None where exact match says nothing."""

    stage: str
    hue: int
    text: str
    correct: bool | None


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        source: Evaluation set.
        key: Key of the sample.
        question: Prompt, shortened.
        full_question: The whole prompt where `question` is not; else empty.
        reference: Right answer.
        pictures: Images, or frames of a video.
        missing: Images that could not be shown.
        answers: In the order of the stages.
    """

    source: str
    key: str
    question: str
    full_question: str
    reference: str
    pictures: list[Picture]
    missing: int
    answers: list[Answer] = field(default_factory=list)


def collect_cards(stages: Sequence[Stage]) -> dict[str, list[Card]]:
    """Group the stages' predictions by evaluation set and sample.

    Args:
        stages: In order; their position is the colour of their answers.

    Returns:
        At most `MAX_CARDS_PER_SOURCE` cards per set.
    """
    sources: dict[str, dict[str, Card]] = {}
    for hue, stage in enumerate(stages):
        for row in stage.predictions:
            cards = sources.setdefault(_text(row.get("source")), {})
            name = _text(row.get("key")) or _text(row.get("question"))
            if name not in cards:
                if len(cards) == MAX_CARDS_PER_SOURCE:
                    continue
                cards[name] = _card(row, stage.folder)
            text = clip(_text(row.get("prediction")), SHORT_TEXT)
            cards[name].answers.append(Answer(stage.short, hue, text, _verdict(stage, row)))
    return {source: list(cards.values()) for source, cards in sources.items()}


def _verdict(stage: Stage, row: dict[str, Any]) -> bool | None:
    """Right or wrong; None in a set that the evaluation does not judge by exact match, such as code to continue."""
    sources = stage.evaluation.get("sources")
    judged = sources.get(row.get("source")) if isinstance(sources, dict) else None
    correct = row.get("correct")
    if not isinstance(correct, bool) or (isinstance(judged, dict) and judged.get("exact_match") is None):
        return None
    return correct


def _card(row: dict[str, Any], folder: Path) -> Card:
    question = _text(row.get("question")).strip()
    listed = row.get("images")
    paths = [str(path) for path in listed] if isinstance(listed, list) else []
    pictures = [picture for path in paths if (picture := load_picture(folder, path, many=len(paths) > 1))]
    return Card(
        source=_text(row.get("source")),
        key=_text(row.get("key")),
        question=clip(question, SHORT_TEXT),
        full_question=clip(question, LONG_TEXT) if len(question) > SHORT_TEXT else "",
        reference=clip(_text(row.get("reference")), SHORT_TEXT),
        pictures=pictures,
        missing=len(paths) - len(pictures),
    )


def load_picture(folder: Path, name: str, *, many: bool) -> Picture | None:
    """Embed an image of a stage.

    Args:
        folder: The stage's folder; images outside it are not read.
        name: Path below it.
        many: Whether it is one of several, which are shown smaller.

    Returns:
        The picture; None when it is missing, is not an image, or lies elsewhere.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError):
        return None
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    shown = SHOWN_SIDE_OF_MANY if many else SHOWN_SIDE
    tiny = max(picture.size) <= TINY_SIDE
    # Whole multiples keep every pixel of a tiny image equally large.
    scale = max(1.0, shown // max(picture.size)) if tiny else min(1.0, 2 * shown / max(picture.size))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if tiny else "JPEG", quality=85)
    kind = "png" if tiny else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Picture(uri, round(picture.width * scale), round(picture.height * scale), tiny)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
