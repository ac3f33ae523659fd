"""Short text-only tasks: what the language part learns before it sees a picture, and what it must not forget after."""

import random
from collections.abc import Callable, Iterator

from data_pipelines.demo.keyed import draw_in_split, keyed_random
from data_pipelines.demo.records import Sample, sample_id, text_sample
from data_pipelines.demo.stdlib_text import paragraphs
from data_pipelines.demo.words import COLOURS, KINDS, NUMBER_WORDS, WORDS

NAME = "text"
Turns = tuple[str, str]


def generate(seed: int, count: int, split: str) -> Iterator[Sample]:
    """Arithmetic, copying, reversing, counting, naming, and sentences to continue; no question is in both splits."""
    for index in range(count):
        rng = keyed_random(seed, NAME, split, index)
        if rng.random() < 0.2:
            question, answer = _continue_sentence(rng, split)
        else:
            question, answer = draw_in_split(rng, split, lambda r: r.choice(TASKS)(r), lambda turns: turns[0])
        yield text_sample(sample_id(NAME, split, index), question, answer)


def _continue_sentence(rng: random.Random, split: str) -> Turns:
    # The splits' sentences come from different modules already.
    words = rng.choice(paragraphs(split)).split()
    cut = rng.randint(3, len(words) * 2 // 3)
    return f"Continue: {' '.join(words[:cut])}", " ".join(words[cut:])


def _add(rng: random.Random) -> Turns:
    a, b = rng.randint(0, 50), rng.randint(0, 50)
    return rng.choice(("What is {a} + {b}?", "Add {a} and {b}.")).format(a=a, b=b), str(a + b)


def _subtract(rng: random.Random) -> Turns:
    a, b = sorted((rng.randint(0, 50), rng.randint(0, 50)), reverse=True)
    return rng.choice(("What is {a} - {b}?", "Take {b} from {a}.")).format(a=a, b=b), str(a - b)


def _larger(rng: random.Random) -> Turns:
    a, b = rng.sample(range(100), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    return f"Which number is {word}, {a} or {b}?", str(pick(a, b))


def _copy_digits(rng: random.Random) -> Turns:
    digits = " ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(2, 6)))
    return rng.choice(("Repeat: {}", "Copy these digits: {}", "Say {}")).format(digits), digits


def _repeat_words(rng: random.Random) -> Turns:
    words = " ".join(rng.sample(WORDS, rng.randint(1, 4)))
    return rng.choice(("Repeat: {}", "Say {}", "Copy the words: {}")).format(words), words


def _reverse_words(rng: random.Random) -> Turns:
    words = rng.sample(WORDS, rng.randint(2, 4))
    return f"Reverse the words: {' '.join(words)}", " ".join(reversed(words))


def _pick_word(rng: random.Random) -> Turns:
    words = rng.sample(WORDS, rng.randint(2, 5))
    place, number = rng.choice((("first", 0), ("last", -1)))
    return f"What is the {place} word? {' '.join(words)}", words[number]


def _count_words(rng: random.Random) -> Turns:
    words = rng.sample(WORDS, rng.randint(1, 6))
    return f"How many words? {' '.join(words)}", str(len(words))


def _kind(rng: random.Random) -> Turns:
    right, other = rng.sample(tuple(KINDS), 2)
    word, options = rng.choice(KINDS[right]), rng.sample((right, other), 2)
    return f"Is {word} a kind of {options[0]} or {options[1]}?", right


def _number_word(rng: random.Random) -> Turns:
    number = rng.randrange(len(NUMBER_WORDS))
    thing = rng.choice(WORDS)
    if rng.random() < 0.5:
        return f"Write {number} as a word, then {thing}.", f"{NUMBER_WORDS[number]} {thing}"
    return f"Write {NUMBER_WORDS[number]} in digits, then {thing}.", f"{number} {thing}"


def _described(rng: random.Random) -> Turns:
    # The answer forms of the picture tasks, with the picture told in words.
    number, colour, thing = rng.randint(0, 9), rng.choice(COLOURS), rng.choice(WORDS)
    code = rng.randint(1000, 9999)
    return rng.choice(
        (
            (f"The {thing} shows the digit {number}. What digit is shown?", str(number)),
            (f"There are {number} {colour} dots on the {thing}. How many dots are there?", str(number)),
            (f"The {thing} is {colour} at the end. Which colour is it at the end?", colour),
            (f"The code of {thing} {number} is {code}. What is the code of {thing} {number}?", str(code)),
        )
    )


TASKS: tuple[Callable[[random.Random], Turns], ...] = (
    _add,
    _subtract,
    _larger,
    _copy_digits,
    _repeat_words,
    _reverse_words,
    _pick_word,
    _count_words,
    _kind,
    _number_word,
    _described,
)
