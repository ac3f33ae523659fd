"""A small RADIO tower pretrained on the demo's pictures without any of their labels.

It stands in for C-RADIO in the demo: the released tower too comes to the chain pretrained, by distillation from other
encoders. Here the task is to paint hidden patches: half of the 16 x 16 patches of a tile are blanked, and a linear
head on the tower's features predicts the normalised pixels of every patch. What a digit means is never shown.

Shape suffixes: T tiles, P tile side in pixels, G patches along one side of a tile, N = G * G, C pixels of a patch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemovl_train.config.schema import OptimConfig
from nemovl_train.model.vision import VisionTower
from nemovl_train.training.lr import learning_rate

log = logging.getLogger(__name__)

OPTIM = OptimConfig(lr=2e-3, warmup_fraction=0.1, weight_decay=0.05, beta2=0.98)
STEPS = 300
TILES_PER_STEP = 64
HIDDEN_SHARE = 0.5


def pretrain_tower(tower: VisionTower, tiles_T3PP: Tensor, *, seed: int, steps: int = STEPS) -> list[float]:
    """Train the tower in place.

    Args:
        tower: Tower with initial weights.
        tiles_T3PP: [T, 3, P, P] uint8, pictures without labels.
        seed: Seed of the head, the batches and the hidden patches.
        steps: Optimiser steps.

    Returns:
        Mean squared error of every step, in units of the normalised pixels' variance.
    """
    generator = torch.Generator().manual_seed(seed)
    patch = tower.patch_dim
    head = nn.Linear(tower.visual_hidden_size, 3 * patch * patch)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    head.to(tower.class_token.device)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *head.parameters()], betas=(OPTIM.beta1, OPTIM.beta2), weight_decay=OPTIM.weight_decay
    )
    losses = []
    with _one_thread():
        for step in range(steps):
            chosen = torch.randint(tiles_T3PP.shape[0], (TILES_PER_STEP,), generator=generator)
            loss = _hidden_patch_loss(tower, head, tiles_T3PP[chosen], generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(OPTIM, step, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def _hidden_patch_loss(tower: VisionTower, head: nn.Linear, tiles_T3PP: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of every patch's pixels, predicted from tiles of which a random half is blank."""
    patch, grid = tower.patch_dim, tower.img_h // tower.patch_dim
    device = tower.class_token.device
    pixels_T3PP = tower.normalize(tiles_T3PP.to(device))
    # Drawn on the CPU, so that it is the same on every device.
    hidden_T1GG = (torch.rand(len(tiles_T3PP), 1, grid, grid, generator=generator) < HIDDEN_SHARE).to(device)
    blanked = pixels_T3PP.masked_fill(hidden_T1GG.repeat_interleave(patch, 2).repeat_interleave(patch, 3), 0.0)
    features_TND = tower(blanked)[:, tower.class_token_len :]
    return F.mse_loss(head(features_TND), _patches(pixels_T3PP, patch))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits, must not depend on what ran in this process before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _patches(pixels_T3PP: Tensor, patch: int) -> Tensor:
    """Pixels by patch, [T, N, C], patches row by row."""
    return F.unfold(pixels_T3PP, kernel_size=patch, stride=patch).transpose(1, 2)
