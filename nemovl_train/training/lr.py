"""Learning rate as a pure function of the step."""

import math

from nemovl_train.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to `min_lr` (arXiv 2511.03929 section 3).

    Args:
        optim: Peak, floor and warm-up share.
        step: Steps already done; 0 for the first update.
        total_steps: Length of the run.

    Returns:
        Learning rate of the update that follows `step` finished steps.
    """
    warmup_steps = round(optim.warmup_fraction * total_steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1.0 + math.cos(math.pi * min(1.0, progress)))
