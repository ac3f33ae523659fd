"""Which rank encodes which image tile of a pack, and where the features go. Plain arithmetic, no collectives.

Tower and projector are replicas on all ranks. The ranks that share a pack (tensor x context parallel) deal its tiles
among themselves in the order of their tokens: all tiles of a pack have one size, so equal numbers are equal work, and
neighbouring tiles are mostly needed by one rank. Between data parallel ranks the plan of the data balances: packs that
share a step are of like cost. Each feature row then travels once, to the ranks that hold its token.

Shape legend: S tokens in a pack, T tiles, K visual tokens of a tile, G ranks that share the pack.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DROPPED = -1
"""Position of a feature that no token stands for."""


@dataclass(frozen=True)
class TileDeal:
    """One rank's part in encoding the tiles of a pack.

    Attributes:
        tiles: [t] int64, tiles that this rank encodes, in token order.
        outgoing: [sum(send)] int64, rows of its [t * K] features in the order they are sent.
        send: Rows for each rank of the group.
        receive: Rows from each rank.
        rows: [sum(receive)] int64, the row of this rank's embeddings that each received feature replaces.
    """

    tiles: Tensor
    outgoing: Tensor
    send: list[int]
    receive: list[int]
    rows: Tensor


def dealt_tiles(tile_token_start: Tensor, rank: int, ranks: int) -> Tensor:
    """[T] -> [t], the tiles that a rank encodes: a run of the tiles in token order, lengths differing by at most 1."""
    run = dealt_run(len(tile_token_start), rank, ranks)
    return tile_token_start.argsort()[run.start : run.stop]


def dealt_run(tiles: int, rank: int, ranks: int) -> range:
    """The tiles that a rank encodes, by their number in token order."""
    return range(tiles * rank // ranks, tiles * (rank + 1) // ranks)


def whole_places(tile_token_start: Tensor, tokens_per_tile: int) -> Tensor:
    """[T] -> [T, K], position of each feature where every tile has all its tokens."""
    return tile_token_start[:, None] + torch.arange(tokens_per_tile)


def deal(tile_token_start: Tensor, places_TK: Tensor, held: list[range], rank: int) -> TileDeal:
    """Plan the exchange of one pack.

    Args:
        tile_token_start: [T] int64 on the host, position of each tile's first token.
        places_TK: [T, K] int64 on the host, position of each feature; `DROPPED` for one that goes nowhere.
        held: Positions whose embeddings each rank of the group holds; ranks may hold the same ones.
        rank: This process's number in the group.
    """
    ranks = len(held)
    mine = places_TK[dealt_tiles(tile_token_start, rank, ranks)].flatten()
    outgoing = [_within(mine, tokens) for tokens in held]
    incoming = []
    for other in range(ranks):
        positions = places_TK[dealt_tiles(tile_token_start, other, ranks)].flatten()
        incoming.append(positions[_within(positions, held[rank])])
    return TileDeal(
        tiles=dealt_tiles(tile_token_start, rank, ranks),
        outgoing=torch.cat(outgoing),
        send=[len(rows) for rows in outgoing],
        receive=[len(positions) for positions in incoming],
        rows=torch.cat(incoming) - held[rank].start,
    )


def _within(positions: Tensor, tokens: range) -> Tensor:
    return ((positions >= tokens.start) & (positions < tokens.stop)).nonzero()[:, 0]
