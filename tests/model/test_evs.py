"""The rule of Efficient Video Sampling against Transformers' own, and against counts worked out by hand."""

import pytest
import torch

from nemovl_train.model.evs import retained, tokens_kept

RATES = [0.0, 0.5, 0.7, 0.75, 0.9]


def features(frames: int, side: int, *, still: float, seed: int = 0) -> torch.Tensor:
    """A video in which a share of the places of every frame repeats the frame before: [T, side * side, H]."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(frames, side * side, 16, generator=generator)
    for t in range(1, frames):
        same = torch.rand(side * side, generator=generator) < still
        out[t, same] = out[t - 1, same]
    return out


def by_hand(features_TKH: torch.Tensor, rate: float) -> list[int]:
    """The rule in plain Python: flat numbers of what is kept."""
    frames, tokens = features_TKH.shape[:2]
    moved = [(-255.0, k) for k in range(tokens)]
    for t in range(1, frames):
        for k in range(tokens):
            a, b = features_TKH[t, k].double(), features_TKH[t - 1, k].double()
            cosine = float(a @ b / (a.norm() * b.norm()))
            moved.append((-round(1 - cosine, 5), t * tokens + k))
    keep = max(tokens, int(frames * tokens * (1 - rate)))
    return sorted(place for _, place in sorted(moved)[:keep])


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("frames", [1, 2, 8, 13])
def test_kept_tokens_are_those_of_transformers(frames, rate):
    from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

    video = features(frames, 4, still=0.4, seed=frames)
    theirs = compute_retention_mask(video.flatten(0, 1), frames, rate)
    assert torch.equal(retained(video, rate).flatten(), theirs.flatten())


@pytest.mark.parametrize("rate", RATES)
def test_kept_tokens_are_those_of_plain_python(rate):
    video = features(6, 3, still=0.0)
    assert retained(video, rate).flatten().nonzero()[:, 0].tolist() == by_hand(video, rate)


def test_counts_of_the_released_size():
    assert [tokens_kept(8, 256, rate) for rate in RATES] == [2048, 1024, 614, 512, 256]
    assert tokens_kept(1, 256, 0.9) == 256
    for rate in RATES:
        kept = retained(features(8, 16, still=0.9), rate)
        assert int(kept.sum()) == tokens_kept(8, 256, rate)
        assert kept[0].all()


def test_what_moves_is_kept():
    video = features(5, 4, still=1.0)
    video[3, 7] = -video[3, 7]
    video[4, 7] = video[3, 7]
    kept = retained(video, 1 - 17 / 80)
    assert int(kept.sum()) == 17
    assert kept[0].all()
    assert kept[3, 7]
