"""Greedy answers by full recomputation: every new token runs the whole prompt again.

Slow and simple. Prompts that are answered together share one pack, so a batch costs one forward pass a token, and
nothing but the training forward pass is needed.

Shape suffixes: M prompts or positions, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemovl_train.config.schema import TokenIds
from nemovl_train.inference.prompt import Prompt, pack_prompts
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL


def most_likely(logits_MV: Tensor, tokens: TokenIds) -> Tensor:
    """Greedy choice at M positions. Never an image token: it stands for a visual feature, which no answer brings.

    Args:
        logits_MV: [M, V].
        tokens: Ids of the model.

    Returns:
        [M] int64.
    """
    if tokens.image >= logits_MV.shape[-1]:
        return logits_MV.argmax(-1)  # a text-only model: its vocabulary ends where the tags would begin
    image = torch.tensor([tokens.image], device=logits_MV.device)
    return logits_MV.index_fill(-1, image, float("-inf")).argmax(-1)


@torch.no_grad()
def generate(model: NemotronVL, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> list[list[int]]:
    """Most likely continuation of each prompt. Collective for the ranks that share the model.

    Args:
        model: Model in evaluation mode.
        prompts: Rendered questions.
        max_new_tokens: Longest answer.

    Returns:
        New ids per prompt, without the end-of-turn token.
    """
    tokens = model.sizes.tokens
    current = list(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    open_prompts = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not open_prompts:
            break
        pack, last = pack_prompts([current[i] for i in open_prompts], pad=tokens.pad, ranks=model.layout.pack_ranks)
        logits_MV = model.logits(PackBatch.from_pack(pack, model.layout), last.to(model.layout.device))
        still_open = []
        for index, token in zip(open_prompts, most_likely(logits_MV, tokens).tolist(), strict=True):
            if token == tokens.eos:
                continue
            answers[index].append(token)
            current[index] = current[index].extended(token)
            still_open.append(index)
        open_prompts = still_open
    return answers
