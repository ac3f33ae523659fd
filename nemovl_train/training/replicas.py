"""Replicas of a weight are bit-identical, or something is broken: memory, a link, a kernel.

Most silent corruptions leave finite values (arXiv 2605.04213 counts 1% NaN or Inf), so the loss does not show them.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from nemovl_train.exceptions import RunFailedError
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.agree import from_every_rank
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.optimizer import parts_of


def check_replicas(model: NemotronVL, layout: Layout) -> None:
    """Compare a hash of every parameter over the ranks that hold the same one. Collective.

    Weights that the optimizer updates are gathered anew at every step, which heals a flipped bit but not the gradients
    that were made with it: the check belongs between backward and update.

    Args:
        model: The model; frozen parts are compared too.
        layout: Owner of the groups.

    Raises:
        RunFailedError: Names rank and tensor, on every rank.
    """
    found: list[str] = []
    for _, module, groups in parts_of(model, layout):
        found += _different(module, groups.dp_cp)
    everyone = sorted({line for lines in from_every_rank(found) for line in lines})
    if everyone:
        raise RunFailedError(
            f"weights that must be equal differ: {'; '.join(everyone[:5])}{' ...' if len(everyone) > 5 else ''}. "
            "Memory, a link or a kernel is broken there; nothing was saved since. Leave that machine out and run the "
            "same command again: it continues from the last checkpoint"
        )


def _different(module: torch.nn.Module, group: dist.ProcessGroup) -> list[str]:
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.numel()]
    if not named:
        return []
    # XOR of all bits: any single flip shows. Viewed as integers of 64 bits, since that type crosses every backend.
    hashes = torch.stack([torch.hash_tensor(parameter.detach()).view(torch.int64) for _, parameter in named])
    gathered = [torch.empty_like(hashes) for _ in range(group.size())]
    dist.all_gather(gathered, hashes, group=group)
    columns = torch.stack(gathered).T.tolist()
    ranks = dist.get_process_group_ranks(group)
    found = []
    for (name, _), column in zip(named, columns, strict=True):
        (usual, count), *others = Counter(column).most_common()
        if others and count == len(column) - count:
            found.append(f"{name} on ranks {ranks} (no majority)")
        elif others:
            found += [f"{name} on rank {rank}" for rank, value in zip(ranks, column, strict=True) if value != usual]
    return found
