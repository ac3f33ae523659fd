"""Suggestions for values that were not understood."""

import difflib
from collections.abc import Iterable


def did_you_mean(value: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """`; did you mean X?`, or the whole choice when it is short, or nothing."""
    choices = list(known)
    match = difflib.get_close_matches(value, choices, n=1, cutoff=cutoff)
    if match:
        return f"; did you mean {match[0]}?"
    if 0 < len(choices) <= 8:
        return f"; choose from {', '.join(choices)}"
    return ""


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The dotted option closest to a dotted key that is not one.

    A sibling with a similar last word wins; then the same last word in another section (`lr` for `optim.lr`); then
    whatever looks alike as a whole.
    """
    options = list(known)
    section, _, word = key.rpartition(".")
    siblings = [option.rpartition(".")[2] for option in options if option.rpartition(".")[0] == section]
    match = difflib.get_close_matches(word, siblings, n=1, cutoff=0.6)
    if match:
        return f"{section}.{match[0]}" if section else match[0]
    same_word = [option for option in options if option.rpartition(".")[2] == word]
    elsewhere = [option for option in options if option.rpartition(".")[0] != section]
    match = difflib.get_close_matches(key, same_word or elsewhere, n=1, cutoff=0.0 if same_word else 0.7)
    return match[0] if match else None


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` on either side of `value`, in words."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{above}" if below <= 0 else f"{below} or {above}"
