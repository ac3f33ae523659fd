"""Videos that give only some of their visual tokens to the language model, in training.

A pack has a fixed number of places for each such video, its `tile_tokens`. Which features take them follows from the
features (`evs.py`), so what lies between the first and the last of these places moves: words and tags of every frame
stay, in order, and around the features of it that are kept, be they many or none. The video as a whole keeps its
length, so nothing outside it moves: documents, labels, weights, and what each rank holds are as planned.

The frames of a video may be on several ranks. Each compares its own with the ones before them, of which the first may
be another's; then all know all numbers, and each comes to the same choice. Dropped features get no gradient.

Shape legend: S tokens in a pack, T tiles of the pack in the order of their tokens, t of them on this rank, K visual
tokens of a tile, H width, R ranks that share the pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.schema import Pack
from nemovl_train.model.evs import FIRST_FRAME, dissimilarity, largest
from nemovl_train.parallel.exchange import exchange_rows
from nemovl_train.parallel.layout import Layout
from nemovl_train.parallel.tiles import DROPPED, dealt_run


@dataclass(frozen=True)
class Pruned:
    """Where everything is once it is known what is kept.

    Attributes:
        input_ids: [S] int64 on the host, the pack's tokens.
        places: [T, K] int64 on the host, position of each feature, tiles as the pack lists them; `DROPPED` for none.
    """

    input_ids: Tensor
    places: Tensor


@torch.no_grad()
def prune_videos(pack: Pack, features_tKH: Tensor, image_token: int, layout: Layout) -> Pruned:
    """Choose what is kept of a pack's videos. Collective for the ranks that share the pack; waits for the device.

    Args:
        pack: Pack with `tile_tokens`.
        features_tKH: [t, K, H], projected features of the tiles that this rank encoded.
        image_token: Id of `<image>`.
        layout: Who shares the pack.
    """
    assert pack.tile_tokens is not None
    order = pack.tile_token_start.argsort()
    owners, video = pack.media_of_tile[order], ~pack.frame_time[order].isnan()
    follows = torch.zeros_like(video)
    follows[1:] = video[1:] & (owners[1:] == owners[:-1])  # a frame of the same video is before it
    scores_TK = _scores(features_tKH, follows, layout).cpu()
    kept_TK = torch.ones(scores_TK.shape, dtype=torch.bool)
    counts = pack.tile_tokens[order]
    for first in (video & ~follows).nonzero()[:, 0].tolist():
        frames = slice(first, first + int((owners == owners[first]).sum()))
        kept_TK[frames] = largest(scores_TK[frames], int(counts[frames].sum()))
    return _moved(pack, order, counts, kept_TK, image_token)


def _scores(features_tKH: Tensor, follows: Tensor, layout: Layout) -> Tensor:
    """[T, K], how much every token of the pack differs from the frame before; all ranks get the same."""
    tiles, ranks, rank = len(follows), layout.pack_ranks, layout.pack_rank
    runs = [dealt_run(tiles, other, ranks) for other in range(ranks)]
    mine, own = runs[rank], follows[runs[rank].start : runs[rank].stop].to(features_tKH.device)
    before = _frame_before(features_tKH, follows, runs, layout) if ranks > 1 else None
    scores = features_tKH.new_empty(features_tKH.shape[:2])
    if len(mine):
        scores = dissimilarity(features_tKH, before).masked_fill(~own[:, None], FIRST_FRAME)
    if ranks == 1:
        return scores
    return exchange_rows(
        scores.repeat(ranks, 1), [len(mine)] * ranks, [len(run) for run in runs], layout.language_groups.tp_cp
    )


def _frame_before(features_tKH: Tensor, follows: Tensor, runs: list[range], layout: Layout) -> Tensor | None:
    """[K, H], the frame before this rank's first, from the rank that encoded it; None where that begins a video."""
    mine, tokens = runs[layout.pack_rank], features_tKH.shape[1]

    def continues(run: range, later: range) -> bool:
        return len(run) > 0 and len(later) > 0 and run.stop == later.start and bool(follows[later.start])

    send = [tokens * continues(mine, run) for run in runs]
    receive = [tokens * continues(run, mine) for run in runs]
    last = features_tKH[-1] if any(send) else features_tKH.new_empty(0, features_tKH.shape[2])
    before = exchange_rows(last, send, receive, layout.language_groups.tp_cp)
    return before if any(receive) else None


def _moved(pack: Pack, order: Tensor, counts: Tensor, kept_TK: Tensor, image_token: int) -> Pruned:
    """The pack's tokens with every tile's run as long as what is kept of it."""
    starts, ids = pack.tile_token_start[order], pack.input_ids
    change = kept_TK.sum(1) - counts
    # What lies behind the end of a run is moved by what that run and those before it have gained or lost.
    shift = torch.zeros(len(ids) + 1, dtype=torch.int64).index_add(0, starts + counts, change).cumsum(0)
    words = (ids != image_token).nonzero()[:, 0]
    input_ids = torch.full_like(ids, image_token)
    input_ids[words + shift[words]] = ids[words]
    places = torch.full(kept_TK.shape, DROPPED)
    begin = starts + change.cumsum(0) - change
    places[kept_TK] = (begin[:, None] + kept_TK.cumsum(1) - 1)[kept_TK]
    listed = torch.empty_like(places)
    listed[order] = places
    return Pruned(input_ids, listed)
