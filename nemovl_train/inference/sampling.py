"""Which token comes next: the most likely one, or a draw from the likely ones.

Shape suffixes: M documents, V vocabulary rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemovl_train.config.schema import TokenIds
from nemovl_train.exceptions import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it before a draw.
        top_p: A draw is from the fewest most likely tokens whose probabilities reach this sum (nucleus sampling, arXiv
            1904.09751).
        seed: Draws depend on it, on the prompt's own tokens and on the place in the answer, and on nothing else: not on
            what is answered beside it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature}: give a number from 0 (the most likely token) up")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}: give a number above 0 and at most 1 (no limit)")
        if problems:
            raise UserError("\n".join(problems))


GREEDY = Sampling()


def without_images(logits_MV: Tensor, tokens: TokenIds) -> Tensor:
    """Logits in which an image token has no chance: it stands for a visual feature, which no answer brings."""
    if tokens.image >= logits_MV.shape[-1]:
        return logits_MV  # a text-only model: its vocabulary ends where the tags would begin
    image = torch.tensor([tokens.image], device=logits_MV.device)
    return logits_MV.index_fill(-1, image, float("-inf"))


def most_likely(logits_MV: Tensor, tokens: TokenIds) -> Tensor:
    """Greedy choice at M positions, never an image token: [M, V] -> [M] int64."""
    return without_images(logits_MV, tokens).argmax(-1)


def next_tokens(logits_MV: Tensor, tokens: TokenIds, sampling: Sampling, draws: Sequence[float]) -> list[int]:
    """Choose one token of every document.

    Args:
        logits_MV: [M, V] float32.
        tokens: Ids of the model.
        sampling: How.
        draws: A number in [0, 1) for each document, see `draw`; greedy choices do not look at it.
    """
    if sampling.temperature == 0:
        return most_likely(logits_MV, tokens).tolist()
    order, mass = nucleus(without_images(logits_MV, tokens), sampling)
    reached = mass.cumsum(-1)
    wanted = torch.tensor(draws, dtype=mass.dtype, device=mass.device)[:, None] * reached[:, -1:]
    # Rounding may put the wanted mass at the very end, behind the last token that has any.
    last = (mass > 0).sum(-1, keepdim=True) - 1
    place = torch.searchsorted(reached, wanted, right=True).minimum(last)
    return order.gather(-1, place)[:, 0].tolist()


def nucleus(logits_MV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens by falling probability [M, V] int64, and their probabilities [M, V] float64, 0 outside the nucleus."""
    probabilities = (logits_MV.double() / sampling.temperature).softmax(-1)
    mass, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = mass.cumsum(-1) - mass
    return order, mass.masked_fill(before >= sampling.top_p, 0.0)


def draw(sampling: Sampling, prompt: str, place: int) -> float:
    """The number in [0, 1) that decides one token.

    Args:
        sampling: Gives the seed.
        prompt: Identity of the prompt.
        place: Number of the token in the answer.
    """
    digest = hashlib.sha256(f"{sampling.seed} {prompt} {place}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2**53
