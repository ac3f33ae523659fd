"""The handwritten digits of scikit-learn (UCI optical digits, BSD-licensed copy), held out by underlying picture."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from data_pipelines.demo.keyed import HELDOUT

PAPER, INK = 245, 20
_HELDOUT_FROM = 0.8  # the file is ordered by writer: its last fifth is mostly other hands


@dataclass(frozen=True, eq=False)
class Digit:
    """One handwritten digit.

    Attributes:
        number: Row in the scikit-learn set.
        label: 0 to 9.
        ink: [8, 8] float32 in [0, 1], 1 where the pen was.
    """

    number: int
    label: int
    ink: np.ndarray


@cache
def digits(split: str) -> tuple[Digit, ...]:
    """All digits of the split, in file order; no picture is in both splits."""
    # Imported here: scikit-learn costs seconds, and only these sets need it.
    from sklearn.datasets import load_digits

    data = load_digits()
    every = [
        Digit(number, int(label), (pixels / 16).astype(np.float32))
        for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True))
    ]
    cut = int(len(every) * _HELDOUT_FROM)
    return tuple(every[cut:] if split == HELDOUT else every[:cut])


def draw_digit(canvas: Image.Image, digit: Digit, box: tuple[int, int], side: int, ink: int = INK) -> None:
    """Puts a smoothly enlarged digit on the canvas.

    Args:
        canvas: Picture to draw on (mode L).
        digit: What to draw.
        box: Left and top corner in pixels.
        side: Side of the enlarged digit in pixels.
        ink: Grey level of the pen.
    """
    mask = Image.fromarray(np.rint(digit.ink * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste(ink, (*box, box[0] + side, box[1] + side), mask)


def blank(width: int = 64, height: int = 64, paper: int = PAPER) -> Image.Image:
    """An empty light sheet (mode L)."""
    return Image.new("L", (width, height), paper)
