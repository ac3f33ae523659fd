"""Efficient Video Sampling (arXiv 2510.14624): which visual tokens of a video reach the language model.

Tokens that hardly differ from the same place of the frame before say little that is new. At a pruning rate q the rule
of the released model's serving code (vLLM, `multimodal/video_prune/evs.py`) keeps

    keep = max(K, int(T * K * (1 - q)))

tokens of a video with T frames of K tokens: those with the largest 1 - cosine to the frame before, over the projected
features. Frame 0 is always kept whole. How many are kept is known from T, K and q alone (`tokens_kept`, on the data
side, which plans with it); which, only from the features.

Shape legend: T frames, K tokens of a frame, H width of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.media.rules import tokens_kept

FIRST_FRAME = 255.0
"""Dissimilarity that stands for frame 0, which has no frame before it: above every real one, which is at most 2."""


def retained(features_TKH: Tensor, rate: float) -> Tensor:
    """Which tokens of one video are kept.

    Args:
        features_TKH: [T, K, H], projected features of its frames.
        rate: Share of the tokens to drop, in [0, 1).

    Returns:
        [T, K] bool with `tokens_kept` entries set; of equal tokens the earlier ones.
    """
    assert 0 <= rate < 1, rate
    frames, tokens = features_TKH.shape[:2]
    return largest(dissimilarity(features_TKH), tokens_kept(frames, tokens, rate))


def dissimilarity(features_TKH: Tensor, before_KH: Tensor | None = None) -> Tensor:
    """1 - cosine of every token to its place in the frame before.

    Args:
        features_TKH: [T, K, H], frames one after the other.
        before_KH: [K, H], the frame before the first of them; None where that is a video's first.

    Returns:
        [T, K], `FIRST_FRAME` for a frame without one before it.
    """
    moved = 1 - F.cosine_similarity(features_TKH[1:], features_TKH[:-1], dim=-1)
    if before_KH is None:
        first = moved.new_full((1, features_TKH.shape[1]), FIRST_FRAME)
    else:
        first = 1 - F.cosine_similarity(features_TKH[:1], before_KH[None], dim=-1)
    return torch.cat([first, moved])


def largest(scores_TK: Tensor, count: int) -> Tensor:
    """[T, K] bool with the `count` largest entries set; of equal ones the earlier."""
    order = scores_TK.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(scores_TK.numel(), dtype=torch.bool, device=scores_TK.device)
    kept[order[:count]] = True
    return kept.view(scores_TK.shape)
