"""Made data for `stage_steps.py`: a tokenizer of the full vocabulary and a dataset for every source of the recipes.

No network, no video decoder, seconds: words of four letters that are one token each, and pictures of smooth noise. What
a source holds goes by its name: text, code, long texts, one picture a sample, or many (frames of a video are tiles like
any other).
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data_pipelines.demo.records import Sample, image_sample, text_sample
from data_pipelines.demo.tokenizer import MEDIA_TAGS, SPECIALS
from data_pipelines.media.rules import RenderRules
from data_pipelines.shards import write_dataset

SPACE = "\u0120"
"""How byte-level tokenizers write a space."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Samples of one kind.

    Attributes:
        samples: How many.
        asked: Words of the question.
        answered: Words of the answer.
        pictures: Pictures of a sample.
        tiles_wide: Side of a picture in tiles.
    """

    samples: int
    asked: int
    answered: int
    pictures: int = 0
    tiles_wide: int = 1

    def divided(self, by: int) -> Shape:
        """The same with shorter texts and fewer pictures."""
        return Shape(
            samples=self.samples,
            asked=self.asked // by,
            answered=self.answered // by,
            pictures=-(-self.pictures // 8),
            tiles_wide=self.tiles_wide,
        )


SHAPES = {
    "text": Shape(samples=8, asked=1400, answered=2000),
    "code": Shape(samples=6, asked=4000, answered=12200),
    # Two of them fill a pack of 311,296 tokens; the paper's mean is 162,162.
    "long": Shape(samples=4, asked=140000, answered=15500),
    # Four tiles and a thumbnail.
    "picture": Shape(samples=8, asked=300, answered=700, pictures=1, tiles_wide=2),
    "frames": Shape(samples=4, asked=100, answered=400, pictures=32),
}
KINDS = {
    "long_context": "long",
    "code_reasoning": "code",
    "text_reasoning": "text",
    "function_calling": "text",
}


def kind_of(source: str) -> str:
    """Kind of samples of a source of the recipes."""
    return KINDS.get(source, "frames" if source.startswith(("video_", "multi_")) else "picture")


def write_tokenizer(folder: Path, *, rows: int) -> list[str]:
    """Write a byte-level BPE tokenizer with the released one's special ids, and `rows` ids before the media tags.

    Each merge adds a letter to a word that follows a space, so the longest words of the vocabulary are one token each.

    Returns:
        Those words.
    """
    vocabulary = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    words = [SPACE]
    while len(vocabulary) < rows:
        grown = itertools.product(words, string.ascii_lowercase)
        new = list(itertools.islice(grown, rows - len(vocabulary)))
        merges += new
        words = [word + letter for word, letter in new]
        vocabulary += words
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in MEDIA_TAGS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return [word.removeprefix(SPACE) for word in words]


def write_source(folder: Path, shape: Shape, words: list[str], *, tokenizer: Path, rules: RenderRules) -> None:
    """Write one dataset folder."""
    samples = _samples(folder.name, shape, words, rules.tile_size)
    write_dataset(
        folder,
        {"train": samples},
        name=folder.name,
        tokenizer=tokenizer,
        template=rules.template,
        tile_size=rules.tile_size,
        max_tiles=rules.max_tiles,
        use_thumbnail=rules.use_thumbnail,
        video_fps=rules.video_fps,
        max_frames=rules.max_frames,
    )


def _samples(name: str, shape: Shape, words: list[str], tile: int) -> Iterator[Sample]:
    drawn = random.Random(name)
    noise = np.random.default_rng(len(name))
    for number in range(shape.samples):
        question, answer = (" " + " ".join(drawn.choices(words, k=count)) for count in (shape.asked, shape.answered))
        key = f"{name}-{number:04d}"
        if not shape.pictures:
            yield text_sample(key, question, answer)
            continue
        side = tile * shape.tiles_wide
        coarse = noise.integers(0, 256, (shape.pictures, 16, 16, 3), dtype=np.uint8)
        pictures = [Image.fromarray(grid).resize((side, side), Image.Resampling.BILINEAR) for grid in coarse]
        yield image_sample(key, pictures, question, answer, fmt="JPEG")
