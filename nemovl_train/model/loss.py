"""Cross entropy over a vocabulary that tensor parallel ranks share, at supervised positions only.

Shape legend: S tokens in a pack, M supervised ones, H hidden, V vocabulary rows of this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core import tensor_parallel  # noqa: E402

IGNORE = -100
"""Label of a position without a target."""

# Positions whose logits exist at the same time; at 132,096 rows over TP 4 this is 0.27 GB in float32.
CHUNK = 2048


def token_loss(
    hidden: Tensor, head: Any, labels: Tensor, supervised: Tensor | None = None, *, chunk: int = CHUNK
) -> Tensor:
    """Cross entropy of every position. Weighting is the caller's: `(token_loss(...) * loss_weight).sum()`.

    Logits are computed only where there is a label, `chunk` positions at a time, and again in backward instead of being
    kept. Padding rows of the vocabulary are ordinary rows, as in the released weights.

    Args:
        hidden: [S, 1, H] after the final norm; this rank's part of S with sequence parallelism.
        head: The output layer: a column parallel linear without bias, as `LanguageModel.output_layer`.
        labels: [S] int64, the target predicted at each position, `IGNORE` where there is none. The same on every
            tensor parallel rank.
        supervised: [M] int64, positions with a target; None asks `labels`, which waits for the device.
        chunk: Most positions at a time.

    Returns:
        [S] float32, zero where there is no label. Connected to the graph even if there is none anywhere, so that every
        rank runs the same collectives.
    """
    if head.sequence_parallel:
        # Backward sums over ranks and splits again, which the head's own communication would do twice.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=head.tp_group)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=head.tp_group)
    positions = torch.nonzero(labels != IGNORE).squeeze(1) if supervised is None else supervised
    rows, targets = hidden.squeeze(1).index_select(0, positions), labels.index_select(0, positions)
    pieces = zip(rows.split(chunk), targets.split(chunk), strict=True)
    if len(positions) <= chunk:
        losses = [_cross_entropy(r, head.weight, t, head.tp_group) for r, t in pieces]
    else:
        losses = [
            checkpoint(_cross_entropy, r, head.weight, t, head.tp_group, use_reentrant=False, preserve_rng_state=False)
            for r, t in pieces
        ]
    return torch.zeros(len(labels), device=hidden.device).index_copy(0, positions, torch.cat(losses))


def _cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, tp_group: Any) -> Tensor:
    """[M, H], [V, H], [M] -> [M] float32."""
    logits = F.linear(rows, weight).float()
    return tensor_parallel.vocab_parallel_cross_entropy(logits, targets, tp_group=tp_group)
