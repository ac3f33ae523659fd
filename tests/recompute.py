"""Decoding by its definition, without a cache: every token is a full forward pass over all tokens before it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data_pipelines.schema import IGNORE_LABEL, Pack
from nemovl_train.inference.prompt import Prompt
from nemovl_train.inference.sampling import without_images
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL

LENGTH_BUCKET = 64


def extended(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """The prompt with more tokens behind it."""
    return replace(prompt, input_ids=(*prompt.input_ids, *tokens))


def pack_prompts(prompts: Sequence[Prompt], *, pad: int = 0) -> tuple[Pack, Tensor]:
    """Several prompts in one sequence, each a document of its own.

    Args:
        prompts: Prompts to answer together.
        pad: Id that fills the tail.

    Returns:
        The pack, and for each prompt the position of its last token, [len(prompts)] int64.
    """
    lengths = np.array([len(prompt.input_ids) for prompt in prompts])
    ends = lengths.cumsum()
    used = int(ends[-1])
    size = -(-used // LENGTH_BUCKET) * LENGTH_BUCKET
    documents = [*lengths.tolist(), size - used] if size > used else lengths.tolist()
    ids = np.full(size, pad, dtype=np.int64)
    ids[:used] = np.concatenate([prompt.input_ids for prompt in prompts])
    starts = ends - lengths
    tile_start = [
        int(start) + place for start, prompt in zip(starts, prompts, strict=True) for place in prompt.tile_start
    ]
    tiles = torch.cat([prompt.tiles for prompt in prompts])
    pack = Pack(
        index=-1,
        input_ids=torch.from_numpy(ids),
        labels=torch.full((size,), IGNORE_LABEL),
        loss_weight=torch.zeros(size),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in documents])),
        seq_idx=torch.from_numpy(np.repeat(np.arange(len(documents), dtype=np.int32), documents)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(documents)]).astype(np.int32)),
        max_seqlen=max(documents),
        tiles=tiles,
        tile_token_start=torch.tensor(tile_start, dtype=torch.int64),
        media_of_tile=torch.zeros(tiles.shape[0], dtype=torch.int32),
        is_thumbnail=torch.zeros(tiles.shape[0], dtype=torch.bool),
        frame_time=torch.full((tiles.shape[0],), float("nan")),
        sample_keys=tuple(f"prompt{i}" for i in range(len(prompts))),
        dataset_ids=("prompt",) * len(prompts),
        stats={"tokens": used, "supervised_tokens": 0, "visual_tokens": 0, "padding": size - used},
    )
    return pack, torch.from_numpy(ends - 1)


@torch.no_grad()
def last_logits(model: NemotronVL, prompts: Sequence[Prompt]) -> Tensor:
    """Logits behind each prompt, by the training forward pass over all of them in one pack."""
    pack, last = pack_prompts(prompts)
    return model.logits(PackBatch.from_pack(pack, model.layout), last.to(model.layout.device))


def step_by_step(model: NemotronVL, prompt: Prompt, count: int) -> tuple[list[int], Tensor]:
    """Greedy ids, and the logits of every step [count, V]."""
    ids: list[int] = []
    logits = []
    for _ in range(count):
        logits.append(without_images(last_logits(model, [prompt]), model.sizes.tokens))
        ids.append(int(logits[-1].argmax()))
        prompt = extended(prompt, ids[-1:])
    return ids, torch.cat(logits)
