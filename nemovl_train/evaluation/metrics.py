"""Scores of one answer against its references, each as its publication defines it. No torch, no media.

All take the answer as written and a list of acceptable references, and give a number from 0 to 1, best reference first.
`scored_answer` takes a reasoning trace away before any of them looks.

| metric | definition |
|---|---|
| exact_match | equal after SQuAD's normalisation: lower case, no articles or punctuation (arXiv 1606.05250) |
| strict_match | equal but for space at the ends |
| anls | normalised Levenshtein similarity, 0 where half of the text or more differs (Biten et al., ICCV 2019) |
| relaxed_accuracy | numbers within 5% of the reference, other answers equal (ChartQA, arXiv 2203.10244; PlotQA) |
| token_f1 | harmonic mean of precision and recall over SQuAD's words (arXiv 1606.05250) |
| edit_similarity | 1 - Levenshtein distance / length of the longer text (as OmniDocBench, arXiv 2412.07626) |
| iou | intersection over union of the predicted and the reference box |
| grounding | 1 where that is at least 0.5 (RefCOCO's accuracy at 0.5) |
| multiple_choice | the chosen letter is the right one |
| contains | a reference is somewhere in the answer, case and line ends aside (OCRBench, arXiv 2305.07895) |
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

END_THINK = "</think>"
ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
GROUNDING_IOU = 0.5

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = r"-?\d+(?:\.\d+)?"
_BOX = re.compile(r"[\[(<]\s*" + r"\s*,\s*".join([f"({_NUMBER})"] * 4) + r"\s*[\])>]")
_LETTER_ALONE = re.compile(r"\(?([A-Z])[).:]?")
_LETTER_FIRST = re.compile(r"\(([A-Z])\)|([A-Z])[).:]\s")
_LETTER_NAMED = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*:?\s*\**\(?([A-Z])\b", re.IGNORECASE)


def scored_answer(text: str) -> str:
    """What follows the reasoning trace; nothing where a trace was begun and not ended."""
    if END_THINK in text:
        return text.rpartition(END_THINK)[2].strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


def strict_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is a reference, character by character."""
    return float(any(answer.strip() == reference.strip() for reference in references))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is a reference after SQuAD's normalisation."""
    return float(any(_squad(answer) == _squad(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Overlap of words with the nearest reference."""
    return max((_f1(_squad(answer).split(), _squad(reference).split()) for reference in references), default=0.0)


def anls(answer: str, references: Sequence[str]) -> float:
    """Similarity to the nearest reference, case and space aside; 0 where the distance is half of the length or more."""
    best = max((_similarity(_spaced(answer), _spaced(reference)) for reference in references), default=0.0)
    return best if 1 - best < ANLS_THRESHOLD else 0.0


def edit_similarity(answer: str, references: Sequence[str]) -> float:
    """Similarity to the nearest reference, case included."""
    return max((_similarity(answer.strip(), reference.strip()) for reference in references), default=0.0)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 where a number is within 5% of a reference, or another answer equals one but for case."""
    return float(any(_relaxed(answer.strip(), reference.strip()) for reference in references))


def contains(answer: str, references: Sequence[str]) -> float:
    """1 where a reference is part of the answer."""
    text = _one_line(answer)
    return float(any(_one_line(reference) in text for reference in references))


def iou(answer: str, references: Sequence[str]) -> float:
    """Largest overlap of the first box in the answer with the box of a reference; 0 where there is none.

    A box is four numbers in brackets, left, top, right, bottom, in the units of the reference.
    """
    found = box(answer)
    boxes = [box(reference) for reference in references]
    return max((box_iou(found, other) for other in boxes if found and other), default=0.0)


def grounding(answer: str, references: Sequence[str]) -> float:
    """1 where the box is right by RefCOCO's measure."""
    return float(iou(answer, references) >= GROUNDING_IOU)


def multiple_choice(answer: str, references: Sequence[str]) -> float:
    """1 where the chosen letter is a reference's; the answer may be a letter alone, lead with one, or name one."""
    chosen = choice(answer)
    return float(chosen is not None and any(choice(reference) == chosen for reference in references))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "strict_match": strict_match,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "token_f1": token_f1,
    "edit_similarity": edit_similarity,
    "iou": iou,
    "grounding": grounding,
    "multiple_choice": multiple_choice,
    "contains": contains,
}
"""By the names that commands and configs use."""


def choice(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question picks, None where that is not clear."""
    text = text.strip()
    alone = _LETTER_ALONE.fullmatch(text) or _LETTER_ALONE.fullmatch(text.upper())
    if alone:
        return alone[1]
    first = _LETTER_FIRST.match(text)
    if first:
        return first[1] or first[2]
    named = _LETTER_NAMED.findall(text)
    return named[-1].upper() if named else None


def box(text: str) -> tuple[float, float, float, float] | None:
    """The first box in a text: left, top, right, bottom."""
    found = _BOX.search(text)
    if not found:
        return None
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes; one that is turned inside out has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (one, other)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other."""
    if len(one) < len(other):
        one, other = other, one
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - levenshtein(one, other) / longest if longest else 1.0


def _squad(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def _relaxed(answer: str, reference: str) -> bool:
    found, wanted = _number(answer), _number(reference)
    # A reference of zero has no relative distance, so it counts as a text (as in lmms-eval's and VLMEvalKit's ChartQA).
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= RELAXED_TOLERANCE
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    """The number that a whole text is; a percent sign divides by 100, as ChartQA's evaluation has it."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
