"""Answers to batches of prompts, token by token over a cache of what the model has seen.

    answers = generate(model, prompts, max_new_tokens=128, sampling=Sampling(temperature=0.6, top_p=0.95))

Prompts of any lengths are answered together and as if each were alone: see `nemovl_train/model/cache.py` for what is
remembered, and `sampling.py` for how tokens are chosen.

Shape suffixes: S tokens of a pass, M documents, T tiles, K visual tokens of a tile, H width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemovl_train.inference.prompt import Prompt
from nemovl_train.inference.sampling import GREEDY, Sampling, draw, next_tokens
from nemovl_train.model.cache import CachedParams, DecodingCache
from nemovl_train.model.evs import retained
from nemovl_train.model.vlm import NemotronVL

MAX_TILES_AT_ONCE = 128
"""Tiles that the tower encodes in one call (as vLLM does)."""
MAX_PROMPTS, MAX_TOKENS = 64, 65536
"""Prompts, and tokens of their prompts, that are answered together."""


@torch.no_grad()
def generate(
    model: NemotronVL,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    video_pruning_rate: float = 0.0,
) -> list[list[int]]:
    """Continuation of each prompt. Collective for the ranks that share the model; all get the same.

    Args:
        model: Model in evaluation mode.
        prompts: Rendered questions.
        max_new_tokens: Longest answer.
        sampling: How tokens are chosen; greedy unless asked otherwise.
        stop: Ids that end an answer, besides the end of a turn.
        video_pruning_rate: Share of each video's visual tokens to drop (Efficient Video Sampling), in [0, 1).

    Returns:
        New ids per prompt, without the one that ended the answer.
    """
    answers: list[list[int]] = []
    ends = {model.sizes.tokens.eos, *stop}
    for batch in _batches(prompts):
        seen = [_see(model, prompt, video_pruning_rate) for prompt in batch]
        answers += _answer(model, seen, max_new_tokens, sampling, ends)
    return answers


@dataclass(frozen=True)
class _Seen:
    """A prompt as the language model takes it: ids with one image token for each of the features [F, H]."""

    input_ids: Tensor
    features: Tensor | None
    identity: str


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        if batch and (len(batch) == MAX_PROMPTS or tokens + len(prompt.input_ids) > MAX_TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(prompt)
        tokens += len(prompt.input_ids)
    if batch:
        yield batch


def _see(model: NemotronVL, prompt: Prompt, rate: float) -> _Seen:
    """Encode a prompt's tiles, and drop the visual tokens of its videos that say little."""
    ids = torch.tensor(prompt.input_ids)
    if not len(prompt.tiles):
        return _Seen(ids, None, prompt.identity)
    tiles = prompt.tiles.to(model.layout.device)
    features_TKH = torch.cat([model.encode_tiles(part) for part in tiles.split(MAX_TILES_AT_ONCE)])
    kept = torch.ones(features_TKH.shape[:2], dtype=torch.bool, device=features_TKH.device)
    for video in prompt.videos if rate else ():
        frames = slice(video.start, video.stop)
        kept[frames] = retained(features_TKH[frames], rate)
    visual = ids == model.sizes.tokens.image
    visible = torch.ones_like(visual)
    visible[visual] = kept.flatten().cpu()  # tiles are in the order of their tokens
    return _Seen(ids[visible], features_TKH[kept], prompt.identity)


def _answer(
    model: NemotronVL, prompts: Sequence[_Seen], max_new_tokens: int, sampling: Sampling, ends: set[int]
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    writing = list(range(len(prompts)))
    cache = DecodingCache()
    features = [prompt.features for prompt in prompts if prompt.features is not None]
    logits_MV = _pass(model, cache, [p.input_ids.tolist() for p in prompts], torch.cat(features) if features else None)
    for place in range(max_new_tokens):
        draws = [draw(sampling, prompts[i].identity, place) for i in writing] if sampling.temperature else []
        chosen = next_tokens(logits_MV, model.sizes.tokens, sampling, draws)
        going_on = [k for k, token in enumerate(chosen) if token not in ends]
        for k in going_on:
            answers[writing[k]].append(chosen[k])
        if not going_on or place + 1 == max_new_tokens:
            break
        if len(going_on) < len(writing):
            cache.keep(going_on)
            writing = [writing[k] for k in going_on]
        logits_MV = _pass(model, cache, [[chosen[k]] for k in going_on])
    return answers


def _pass(
    model: NemotronVL, cache: DecodingCache, new: Sequence[Sequence[int]], features: Tensor | None = None
) -> Tensor:
    """Logits [M, V] after the new tokens of every document, which the cache holds from now on."""
    device, layout = model.layout.device, model.layout
    lengths = [len(ids) for ids in new]
    used = sum(lengths)
    # Sequence parallel ranks hold equal runs of the tokens.
    size = -(-used // layout.tp) * layout.tp if layout.sequence_parallel else used
    ids = torch.tensor([i for row in new for i in row] + [model.sizes.tokens.pad] * (size - used), device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    return model.decode(ids, CachedParams.of(cache, lengths, size, device), last, features)
