"""Every generator: records are valid, answers are short and true, splits are disjoint, sample i stands alone."""

import ast
import io
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.demo import (
    chart_qa,
    digits_count,
    digits_read,
    image_pair,
    long_facts,
    ocr_line,
    python_code,
    text,
    video_clip,
)
from data_pipelines.demo.digit_images import PAPER, blank, digits, draw_digit
from data_pipelines.demo.keyed import SPLITS
from data_pipelines.demo.records import Sample
from data_pipelines.demo.tokenizer import load
from data_pipelines.schema import validate_record

SEED = 1234
Measure = Callable[[str], int]
Generate = Callable[[int, int, str], Iterator[Sample]]
PICTURES = (digits_read, digits_count, ocr_line, chart_qa, image_pair, video_clip)


@pytest.fixture(scope="module")
def measure(demo: Path) -> Measure:
    tokenizer = load(demo / "tokenizer")
    return cache(lambda content: len(tokenizer.encode(content).ids))


@pytest.fixture(scope="module")
def generators(measure: Measure) -> dict[str, Generate]:
    return {
        **{module.NAME: module.generate for module in PICTURES},
        python_code.NAME: partial(python_code.generate, measure=measure),
        long_facts.NAME: partial(long_facts.generate, measure=measure, max_tokens=1200),
        text.NAME: text.generate,
    }


def turns(sample: Sample) -> tuple[str, str]:
    question, answer = (message["content"][-1]["text"] for message in sample[0]["messages"])
    return question, answer


def pictures(sample: Sample) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in sample[1].values()]


NAMES = (*(module.NAME for module in PICTURES), python_code.NAME, long_facts.NAME, text.NAME)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_valid_short_and_of_one_split(generators: dict[str, Generate], measure: Measure, name: str) -> None:
    seen = {}
    for split in SPLITS:
        samples = list(generators[name](SEED, 60, split))
        for record, members in samples:
            validate_record(record)
            assert {i[i["type"]] for i in record["messages"][0]["content"][:-1]} == set(members)
        if name not in ("code", "text"):
            assert max(measure(turns(sample)[1]) for sample in samples) <= 6
        seen[split] = {(turns(sample)[0], *sample[1].values()) for sample in samples}
    assert not seen["train"] & seen["heldout"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_the_count_but_on_the_seed(generators: dict[str, Generate], name: str) -> None:
    generate = generators[name]
    assert list(generate(SEED, 12, "train"))[:5] == list(generate(SEED, 5, "train"))
    assert list(generate(SEED + 1, 5, "train")) != list(generate(SEED, 5, "train"))


def test_metadata_are_the_media_s_own() -> None:
    for module in PICTURES[:-1]:
        record, members = next(module.generate(SEED, 1, "train"))
        for item in record["messages"][0]["content"][:-1]:
            image = Image.open(io.BytesIO(members[item["image"]]))
            size = {"width": image.width, "height": image.height, "format": image.format, "mode": image.mode}
            assert item["metadata"] == size


def digit_of(sheet: np.ndarray, split: str) -> tuple[int, int]:
    """(row in scikit-learn's set, label) of the only digit that gives this sheet at some shift."""
    ink_rows, ink_columns = np.where(sheet < PAPER)
    found = []
    for digit in digits(split):
        canvas = blank()
        draw_digit(canvas, digit, (0, 0), 56)
        drawn = np.asarray(canvas)
        rows, columns = np.where(drawn < PAPER)
        shift = (ink_rows.min() - rows.min(), ink_columns.min() - columns.min())
        if np.array_equal(np.roll(drawn, shift, (0, 1)), sheet):
            found.append((digit.number, digit.label))
    assert len({label for _, label in found}) == 1
    return found[0]


@pytest.mark.parametrize("split", SPLITS)
def test_digit_labels_are_those_of_the_underlying_picture(split: str) -> None:
    for sample in digits_read.generate(SEED, 4, split):
        assert turns(sample)[1] == str(digit_of(pictures(sample)[0], split)[1])


def test_no_handwritten_digit_is_in_both_splits() -> None:
    numbers = [{digit.number for digit in digits(split)} for split in SPLITS]
    assert not numbers[0] & numbers[1]
    assert len(numbers[0] | numbers[1]) == 1797
    assert {digit.label for digit in digits("heldout")} == set(range(10))


def test_pair_answers_follow_from_the_two_digits() -> None:
    for sample in image_pair.generate(SEED, 6, "heldout"):
        question, answer = turns(sample)
        first, second = (digit_of(sheet, "heldout")[1] for sheet in pictures(sample))
        if question in image_pair.SAME:
            assert answer == ("yes" if first == second else "no")
        else:
            larger = question in image_pair.LARGER
            assert first != second
            assert answer == ("first" if (first > second) == larger else "second")


def islands(dark: np.ndarray) -> int:
    """Number of 4-connected dark regions."""
    left, count = set(zip(*np.where(dark), strict=True)), 0
    while left:
        count, front = count + 1, [left.pop()]
        while front:
            y, x = front.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            front.extend(near)
    return count


def test_counts_are_what_is_on_the_sheet() -> None:
    answers = set()
    for sample in digits_count.generate(SEED, 40, "train"):
        question, answer = turns(sample)
        answers.add(answer)
        if "digits" not in question:
            assert islands(pictures(sample)[0] < 128) == int(answer)
    assert answers == set("12345")


def test_rendered_lines_are_not_clipped() -> None:
    for sample in ocr_line.generate(SEED, 60, "train"):
        sheet = pictures(sample)[0]
        border = np.concatenate([sheet[:2].ravel(), sheet[-2:].ravel(), sheet[:, :2].ravel(), sheet[:, -2:].ravel()])
        assert np.ptp(border) < 30 < 120 < np.ptp(sheet)  # JPEG noise on the border, ink inside
        assert re.fullmatch(r"[a-z0-9 ]{2,15}", turns(sample)[1])


def test_bar_chart_answers_follow_from_the_pixels() -> None:
    checked = 0
    for sample in chart_qa.generate(SEED, 60, "train"):
        question, answer = turns(sample)
        pixels = pictures(sample)[0]
        coloured = np.ptp(pixels, axis=2) > 60
        edges = np.flatnonzero(np.diff(np.r_[0, coloured[51].astype(int), 0]))
        if not len(edges):  # a table
            continue
        heights = [int(coloured[:52, left].sum()) // 4 for left in edges[::2]]
        values = dict(zip(chart_qa.LABELS, heights, strict=False))
        label = re.search(r"\b([A-H])\?", question)
        expected = {
            "How many": str(len(values)),
            "Count": str(len(values)),
            "value of": label and str(values[label[1]]),
            "How much": label and str(values[label[1]]),
            "highest": max(values, key=values.__getitem__),
            "largest": max(values, key=values.__getitem__),
            "lowest": min(values, key=values.__getitem__),
            "smallest": min(values, key=values.__getitem__),
        }
        assert answer == next(truth for words, truth in expected.items() if words in question)
        checked += 1
    assert checked > 20


def square(frame: np.ndarray) -> tuple[str, float, float] | None:
    """(colour, x, y) of the square in a decoded frame, None where there is none."""
    rows, columns = np.where(np.abs(frame.astype(int) - 25).max(axis=2) > 60)
    if not len(rows):
        return None
    x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    pixel = frame[int(y), int(x)].astype(int)
    colour = min(video_clip.COLOURS, key=lambda name: np.abs(pixel - video_clip.COLOURS[name]).sum())
    return colour, x, y


def true_answer(question: str, frames: list[np.ndarray]) -> str:
    seen = [square(frame) for frame in frames]
    if question in video_clip.QUESTIONS["flashes"]:
        return str(sum(now is not None and before is None for before, now in zip([None, *seen], seen, strict=False)))
    first, last = seen[0], seen[-1]
    assert first is not None
    assert last is not None
    if question in video_clip.QUESTIONS["first"]:
        return first[0]
    if question in video_clip.QUESTIONS["last"]:
        return last[0]
    dx, dy = last[1] - first[1], last[2] - first[2]
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def test_video_answers_follow_from_the_decoded_frames() -> None:
    kinds = set()
    for sample in video_clip.generate(SEED, 40, "train"):
        question, answer = turns(sample)
        with av.open(io.BytesIO(sample[1]["0.mp4"]), "r") as container:
            stream = container.streams.video[0]
            assert stream.average_rate == video_clip.FPS
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        metadata = sample[0]["messages"][0]["content"][0]["metadata"]
        assert metadata["video_num_frames"] == len(frames)
        assert metadata["video_duration"] * 8 == len(frames)
        assert frames[0].shape == (metadata["video_height"], metadata["video_width"], 3)
        assert answer == true_answer(question, frames)
        # Sampling twice a second must be enough to answer.
        assert answer == true_answer(question, frames[::4])
        kinds |= {kind for kind, questions in video_clip.QUESTIONS.items() if question in questions}
    assert kinds == set(video_clip.QUESTIONS)


def test_video_bytes_depend_on_the_frames_only() -> None:
    frames = video_clip.render(video_clip.draw_clip(video_clip.keyed_random(1, "clip")))
    assert video_clip.encode_mp4(frames) == video_clip.encode_mp4([frame.copy() for frame in frames])


def test_code_answers_complete_the_function(measure: Measure) -> None:
    for sample in python_code.generate(SEED, 60, "train", measure=measure):
        question, answer = turns(sample)
        task, _, head = question.partition("\n\n")
        whole = f"{head}\n{textwrap.indent(answer, '    ')}" if task in python_code.COMPLETE else answer
        function = ast.parse(whole).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
        assert measure(question) + measure(answer) <= python_code.MAX_TOKENS


@pytest.mark.parametrize(("low", "high"), [(600, 700), (4300, 4500)])
def test_documents_have_the_length_asked_for_and_hold_their_answer_once(measure: Measure, low: int, high: int) -> None:
    samples = long_facts.generate(SEED, 5, "heldout", measure=measure, min_tokens=low, max_tokens=high)
    for question, answer in map(turns, samples):
        assert low - 60 <= measure(question) <= high
        *document, asked = question.split("\n")
        thing = re.search(r"code of (\w+ \d+)", asked)
        assert thing
        assert f"The code of {thing[1]} is {answer}." in document
        assert sum(f"The code of {thing[1]} is" in line for line in document) == 1
        assert 2 <= sum(line.startswith("The code of") for line in document) <= 6


def test_arithmetic_and_word_answers_are_right() -> None:
    checked = 0
    for question, answer in map(turns, text.generate(SEED, 400, "heldout")):
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if "+" in question or question.startswith("Add"):
            assert int(answer) == sum(numbers)
        elif question.startswith("What is") and " - " in question:
            assert int(answer) == numbers[0] - numbers[1]
        elif question.startswith("Take"):
            assert int(answer) == numbers[1] - numbers[0]
        elif question.startswith("Reverse the words: "):
            assert answer.split() == question.removeprefix("Reverse the words: ").split()[::-1]
        elif question.startswith("Which number is"):
            assert int(answer) == (max if "larger" in question else min)(numbers)
        else:
            continue
        checked += 1
    assert checked > 50
