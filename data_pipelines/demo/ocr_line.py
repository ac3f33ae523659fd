"""Read a rendered line of text."""

import random
from collections.abc import Iterator

from PIL import Image, ImageDraw

from data_pipelines.demo.digit_images import blank
from data_pipelines.demo.fonts import FACES, font
from data_pipelines.demo.keyed import draw_in_split, keyed_random
from data_pipelines.demo.records import Sample, image_sample, sample_id
from data_pipelines.demo.words import WORDS

NAME = "ocr_line"
QUESTIONS = (
    "Read the text.",
    "What does the line say?",
    "What is written here?",
    "Transcribe the line.",
    "Which text is shown?",
)
_SIZES = (26, 24, 22, 20, 18, 16, 14)
_MARGIN = 5


def generate(seed: int, count: int, split: str) -> Iterator[Sample]:
    """A short line on a 128 x 64 or 192 x 64 sheet (JPEG, as scans are); the answer is the text.

    Held-out lines are other texts, not other words: a word may be in both splits, a whole line cannot.
    """
    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        text = draw_in_split(rng, split, draw_line)
        width = 128 if len(text) <= 8 else 192
        picture = render(text, width, rng)
        yield image_sample(sample_id(NAME, split, index), [picture], rng.choice(QUESTIONS), text, fmt="JPEG")


def draw_line(rng: random.Random) -> str:
    """One or two words, a number, or a word and a number."""
    word, other = rng.sample(WORDS, 2)
    number = str(rng.randint(10, 9999))
    return rng.choice((word, f"{word} {other}", number, f"{word} {number[:2]}"))


def render(text: str, width: int, rng: random.Random) -> Image.Image:
    """Draws the line with the largest size that fits, at a random place (mode L, 64 px high)."""
    face, paper, ink = rng.choice(FACES), rng.randint(225, 255), rng.randint(0, 60)
    canvas = blank(width, 64, paper)
    pen = ImageDraw.Draw(canvas)
    for size in _SIZES:
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font(face, size))
        if right - left <= width - 2 * _MARGIN:
            break
    x = rng.randint(_MARGIN, max(_MARGIN, int(width - _MARGIN - (right - left)))) - left
    y = rng.randint(_MARGIN, max(_MARGIN, int(64 - _MARGIN - (bottom - top)))) - top
    pen.text((x, y), text, fill=ink, font=font(face, size))
    return canvas
