"""Complete or write a function of the standard library (text only)."""

from collections.abc import Callable, Iterator

from data_pipelines.demo.keyed import keyed_pick, keyed_random
from data_pipelines.demo.records import Sample, sample_id, text_sample
from data_pipelines.demo.stdlib_text import PythonFunction, functions

NAME = "code"
COMPLETE = ("Complete this Python function.", "Write the body of this function.", "Finish this Python code.")
WRITE = ("Write the Python function {name}.", "Implement {name} in Python.", "Give the code of {name}.")
QUESTIONS = COMPLETE + WRITE
MAX_TOKENS = 640
_MIN_TOKENS = 40


def generate(seed: int, count: int, split: str, *, measure: Callable[[str], int]) -> Iterator[Sample]:
    """Documented functions; the answer is the body after signature and docstring, or the whole function.

    Args:
        seed: Seed of the set.
        count: Number of samples.
        split: Held-out functions come from other modules.
        measure: Number of tokens of a text; question and answer together stay within 640.
    """
    pool = [f for f in functions(split) if _MIN_TOKENS <= measure(f.docstring) + measure(f.source) <= MAX_TOKENS - 40]
    for index in range(count):
        function = keyed_pick(pool, seed, NAME, split, index)
        question, answer = _turns(function, seed, split, index)
        yield text_sample(sample_id(NAME, split, index), question, answer)


def _turns(function: PythonFunction, seed: int, split: str, index: int) -> tuple[str, str]:
    rng = keyed_random(seed, NAME, split, index)
    if rng.random() < 0.6:
        return f"{rng.choice(COMPLETE)}\n\n{function.head}", function.body
    task = rng.choice(WRITE).format(name=function.name)
    return f"{task}\n\n{function.docstring}", function.source
