"""What can be evaluated, by name. Importable without torch."""

from dataclasses import dataclass

BENCHMARKS = {"ai2d": "multiple_choice", "chartqa": "relaxed_accuracy", "docvqa": "anls", "ocrbench": "ocrbench"}
"""Names, and the metric that each is published with."""


@dataclass(frozen=True)
class HeldoutSet:
    """A dataset folder to answer from.

    Attributes:
        name: Name in the results.
        path: Dataset folder.
        metrics: Names of `METRICS`.
        split: Split to read.
    """

    name: str
    path: str
    metrics: tuple[str, ...] = ("exact_match",)
    split: str = "heldout"
