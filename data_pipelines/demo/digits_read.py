"""Read one handwritten digit."""

import random
from collections.abc import Iterator

from PIL import Image

from data_pipelines.demo.digit_images import Digit, blank, digits, draw_digit
from data_pipelines.demo.keyed import keyed_pick, keyed_random
from data_pipelines.demo.records import Sample, image_sample, sample_id

NAME = "digits_read"
QUESTIONS = (
    "What digit is shown?",
    "Which digit is this?",
    "Read the digit.",
    "What number is written here?",
    "Name the digit in the picture.",
    "Which number do you see?",
)


def generate(seed: int, count: int, split: str) -> Iterator[Sample]:
    """One digit on a 64 x 64 sheet, shifted by up to 4 px; the answer is the digit."""
    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        digit = keyed_pick(digits(split), seed, NAME, split, index)
        yield image_sample(sample_id(NAME, split, index), [sheet(digit, rng)], rng.choice(QUESTIONS), str(digit.label))


def sheet(digit: Digit, rng: random.Random) -> Image.Image:
    """The digit at 56 x 56 px somewhere on a 64 x 64 sheet, never clipped."""
    canvas = blank()
    draw_digit(canvas, digit, (rng.randint(0, 8), rng.randint(0, 8)), 56)
    return canvas
