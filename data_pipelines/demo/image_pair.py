"""Compare two pictures of one digit each."""

import random
from collections.abc import Iterator

from data_pipelines.demo.digit_images import Digit, digits
from data_pipelines.demo.digits_read import sheet
from data_pipelines.demo.keyed import keyed_random
from data_pipelines.demo.records import Sample, image_sample, sample_id

NAME = "image_pair"
SAME = ("Do both images show the same digit?", "Is it the same digit in both images?", "Are the two digits equal?")
LARGER = (
    "Which image shows the larger digit?",
    "Where is the larger digit?",
    "Which is larger, first or second?",
)
SMALLER = ("Which image shows the smaller digit?", "Where is the smaller digit?")
QUESTIONS = SAME + LARGER + SMALLER


def generate(seed: int, count: int, split: str) -> Iterator[Sample]:
    """Two 64 x 64 sheets; answers are yes, no, first, second."""
    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        question, answer, pair = _draw(rng, digits(split))
        sheets = [sheet(digit, rng) for digit in pair]
        yield image_sample(sample_id(NAME, split, index), sheets, question, answer)


def _draw(rng: random.Random, pool: tuple[Digit, ...]) -> tuple[str, str, tuple[Digit, Digit]]:
    if rng.random() < 0.5:
        same = rng.random() < 0.5  # half the answers are yes: chance is 50%
        return rng.choice(SAME), "yes" if same else "no", _pair(rng, pool, same)
    questions, larger = rng.choice(((LARGER, True), (SMALLER, False)))
    pair = _pair(rng, pool, same=False)
    first = (pair[0].label > pair[1].label) == larger
    return rng.choice(questions), "first" if first else "second", pair


def _pair(rng: random.Random, pool: tuple[Digit, ...], same: bool) -> tuple[Digit, Digit]:
    first = rng.choice(pool)
    while True:
        second = rng.choice(pool)
        if (second.label == first.label) == same and second is not first:
            return first, second
