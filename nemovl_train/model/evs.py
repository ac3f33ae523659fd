"""Efficient Video Sampling (arXiv 2510.14624): which visual tokens of a video reach the language model.

Tokens that hardly differ from the same place of the frame before say little that is new. At a pruning rate q the rule
of the released model's serving code (vLLM, `multimodal/video_prune/evs.py`) keeps

    keep = max(K, int(T * K * (1 - q)))

tokens of a video with T frames of K tokens: those with the largest 1 - cosine to the frame before, over the projected
features. Frame 0 is always kept whole. How many are kept is known from T, K and q alone; which, only from the features.

Shape legend: T frames, K tokens of a frame, H width of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_FRAME = 255.0
"""Dissimilarity that stands for frame 0, which has no frame before it: above every real one, which is at most 2."""


def tokens_kept(frames: int, tokens_per_frame: int, rate: float) -> int:
    """Visual tokens that are left of a video."""
    return max(tokens_per_frame, int(frames * tokens_per_frame * (1 - rate)))


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
    moved = 1 - F.cosine_similarity(features_TKH[1:], features_TKH[:-1], dim=-1)
    first = moved.new_full((1, tokens), FIRST_FRAME)
    order = torch.cat([first, moved]).flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(frames * tokens, dtype=torch.bool, device=features_TKH.device)
    kept[order[: tokens_kept(frames, tokens, rate)]] = True
    return kept.view(frames, tokens)
