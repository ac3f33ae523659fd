"""Count one to five things on a sheet."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data_pipelines.demo.digit_images import INK, Digit, blank, digits, draw_digit
from data_pipelines.demo.keyed import draw_in_split, keyed_random
from data_pipelines.demo.records import Sample, image_sample, sample_id

NAME = "digits_count"
MAX_COUNT = 5
THINGS = ("dots", "squares", "digits")
QUESTIONS = ("How many {things} are there?", "Count the {things}.", "How many {things} do you see?")
_CELL, _SIZE = 21, 14


@dataclass(frozen=True)
class Scene:
    """What is on the sheet: `things` at top-left corners `places` (pixels), on a sheet `width` px wide."""

    things: str
    width: int
    places: tuple[tuple[int, int], ...]


def generate(seed: int, count: int, split: str) -> Iterator[Sample]:
    """Dots, squares or small digits in cells of 21 px (so they never touch); every fourth sheet is 128 px wide."""
    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        scene = draw_in_split(rng, split, draw_scene)
        question = rng.choice(QUESTIONS).format(things=scene.things)
        picture = render(scene, rng, digits(split))
        yield image_sample(sample_id(NAME, split, index), [picture], question, str(len(scene.places)))


def draw_scene(rng: random.Random) -> Scene:
    """A random scene, uniform in the count."""
    width = 128 if rng.random() < 0.25 else 64
    cells = [(x, y) for y in range(0, 64 - _CELL + 1, _CELL) for x in range(0, width - _CELL + 1, _CELL)]
    chosen = rng.sample(cells, rng.randint(1, MAX_COUNT))
    slack = _CELL - _SIZE - 2
    places = tuple((x + 1 + rng.randint(0, slack), y + 1 + rng.randint(0, slack)) for x, y in chosen)
    return Scene(rng.choice(THINGS), width, places)


def render(scene: Scene, rng: random.Random, pool: tuple[Digit, ...]) -> Image.Image:
    """Draws the scene (mode L, 64 px high); the digits come from `pool`."""
    canvas = blank(scene.width)
    pen = ImageDraw.Draw(canvas)
    for x, y in scene.places:
        if scene.things == "digits":
            draw_digit(canvas, rng.choice(pool), (x, y), _SIZE)
        elif scene.things == "dots":
            pen.ellipse((x, y, x + _SIZE - 1, y + _SIZE - 1), fill=INK)
        else:
            pen.rectangle((x, y, x + _SIZE - 1, y + _SIZE - 1), fill=INK)
    return canvas
