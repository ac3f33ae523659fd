"""Find a planted fact in a long document (text only)."""

import random
from collections.abc import Callable, Iterator
from functools import cache

from data_pipelines.demo.keyed import keyed_random
from data_pipelines.demo.records import Sample, sample_id, text_sample
from data_pipelines.demo.stdlib_text import paragraphs

NAME = "long_facts"
FACT = "The code of {thing} {number} is {code}."
QUESTIONS = ("What is the code of {thing} {number}?", "Give the code of {thing} {number}.")
THINGS = ("box", "door", "room", "locker")
MIN_TOKENS, MAX_TOKENS = 600, 4500
_FACTS = (2, 6)
_QUESTION_TOKENS = 24  # more than any question, answer and joining newline need


def generate(
    seed: int,
    count: int,
    split: str,
    *,
    measure: Callable[[str], int],
    min_tokens: int = MIN_TOKENS,
    max_tokens: int = MAX_TOKENS,
) -> Iterator[Sample]:
    """Docstring prose with two to six facts at random depths; the question asks for one of them.

    Args:
        seed: Seed of the set.
        count: Number of samples.
        split: Held-out documents are filled from other modules.
        measure: Number of tokens of a text.
        min_tokens: Shortest target length; lengths are uniform up to the longest.
        max_tokens: Longest document, question included, in tokens (before the chat template).
    """

    @cache
    def tokens(text: str) -> int:
        return measure(text + "\n")

    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        facts = _draw_facts(rng)
        target = rng.randint(min_tokens, max_tokens) - _QUESTION_TOKENS
        lines = _filler(rng, paragraphs(split), tokens, target - sum(measure(fact + "\n") for fact in facts.values()))
        for fact in facts.values():
            lines.insert(rng.randint(0, len(lines)), fact)
        (thing, number, code) = rng.choice(tuple(facts))
        question = rng.choice(QUESTIONS).format(thing=thing, number=number)
        yield text_sample(sample_id(NAME, split, index), "\n".join((*lines, question)), code)


def _draw_facts(rng: random.Random) -> dict[tuple[str, int, str], str]:
    """Sentences by (thing, number, code); no two facts share a thing and number, or a code."""
    count = rng.randint(*_FACTS)
    codes = rng.sample(range(1000, 10000), count)
    keys = rng.sample([(thing, number) for thing in THINGS for number in range(10, 100)], count)
    return {
        (thing, number, str(code)): FACT.format(thing=thing, number=number, code=code)
        for (thing, number), code in zip(keys, codes, strict=True)
    }


def _filler(rng: random.Random, pool: tuple[str, ...], tokens: Callable[[str], int], budget: int) -> list[str]:
    """Paragraphs in random order whose tokens fill the budget and do not exceed it."""
    lines: list[str] = []
    for text in rng.sample(pool, len(pool)):
        cost = tokens(text)
        if cost <= budget:
            lines.append(text)
            budget -= cost
        if budget < 16:
            break
    return lines
