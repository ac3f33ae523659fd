"""Dealing tiles: every feature arrives, in the right row, at every rank that holds its token. Without processes."""

import pytest
import torch

from nemovl_train.parallel.tiles import DROPPED, deal, dealt_tiles, whole_places

TOKENS = 4  # of a tile
LENGTH = 96
# In no order, as a pack of several documents may list them; one tile lies across 24, 48 and 72 each.
STARTS = torch.tensor([46, 2, 22, 30, 70, 84, 88])


def shares(ranks: int, copies: int) -> list[range]:
    """Runs of tokens, each held by `copies` ranks one after the other."""
    runs = ranks // copies
    return [range(LENGTH * (r // copies) // runs, LENGTH * (r // copies + 1) // runs) for r in range(ranks)]


def exchanged(starts: torch.Tensor, places: torch.Tensor, held: list[range]) -> list[torch.Tensor]:
    """What every rank's rows hold after the exchange: the position of the feature that landed there, or -1."""
    plans = [deal(starts, places, held, rank) for rank in range(len(held))]
    # A feature is stood for by the position of its token.
    made = [places[p.tiles].flatten() for p in plans]
    sent = [rows[p.outgoing].split(p.send) for rows, p in zip(made, plans, strict=True)]
    out = []
    for rank, plan in enumerate(plans):
        arrived = [parts[rank] for parts in sent]
        assert [len(part) for part in arrived] == plan.receive
        rows = torch.full((len(held[rank]),), -1)
        rows[plan.rows] = torch.cat(arrived)
        out.append(rows)
    return out


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_every_feature_arrives(ranks, copies, count):
    starts = STARTS[:count]
    visual = torch.full((LENGTH,), -1)
    for start in starts.tolist():
        visual[start : start + TOKENS] = torch.arange(start, start + TOKENS)
    held = shares(ranks, copies)
    for tokens, rows in zip(held, exchanged(starts, whole_places(starts, TOKENS), held), strict=True):
        assert torch.equal(rows, visual[tokens.start : tokens.stop])


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, 2), (4, 1), (4, 2)])
def test_a_dropped_feature_goes_nowhere(ranks, copies):
    places = whole_places(STARTS, TOKENS)
    places[torch.rand(places.shape, generator=torch.Generator().manual_seed(0)) < 0.4] = DROPPED
    visual = torch.full((LENGTH,), -1)
    visual[places[places != DROPPED]] = places[places != DROPPED]
    held = shares(ranks, copies)
    for tokens, rows in zip(held, exchanged(STARTS, places, held), strict=True):
        assert torch.equal(rows, visual[tokens.start : tokens.stop])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_work_is_even_and_each_tile_is_encoded_once(ranks):
    dealt = [dealt_tiles(STARTS, rank, ranks) for rank in range(ranks)]
    assert torch.cat(dealt).sort().values.tolist() == list(range(len(STARTS)))
    counts = [len(tiles) for tiles in dealt]
    assert max(counts) - min(counts) <= 1
    in_token_order = torch.cat([STARTS[tiles] for tiles in dealt])
    assert torch.equal(in_token_order, STARTS.sort().values)
