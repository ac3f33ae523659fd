"""Choices against Transformers' own nucleus, against frequencies, and against what an image token may not be."""

import pytest
import small_vlm
import torch

from nemovl_train.exceptions import UserError
from nemovl_train.inference.sampling import GREEDY, Sampling, draw, most_likely, next_tokens, nucleus

TOKENS = small_vlm.CONFIG.tokens


def test_an_image_token_is_never_chosen():
    logits = torch.zeros(1, small_vlm.BASE + 16)
    logits[0, TOKENS.image], logits[0, 7] = 9.0, 1.0
    assert most_likely(logits, TOKENS).tolist() == [7]
    assert next_tokens(logits, TOKENS, GREEDY, []) == [7]
    assert logits[0, TOKENS.image] == 9.0
    assert most_likely(logits[:, : TOKENS.image], TOKENS).tolist() == [7]
    chosen = {next_tokens(logits, TOKENS, Sampling(temperature=1.0), [i / 500])[0] for i in range(500)}
    assert TOKENS.image not in chosen
    assert len(chosen) > 100


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.6, 0.95), (2.0, 0.3), (0.7, 1.0)])
def test_the_nucleus_is_that_of_transformers(temperature, top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3
    theirs = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits.double())).softmax(-1)
    order, mass = nucleus(logits, Sampling(temperature=temperature, top_p=top_p))
    ours = torch.zeros_like(theirs).scatter(-1, order, mass)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs)


def test_draws_have_the_probabilities_of_the_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.05, 0.3, 0.15]]))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    count = 4000
    chosen = [next_tokens(logits, TOKENS, sampling, [(i + 0.5) / count])[0] for i in range(count)]
    shares = [chosen.count(i) / count for i in range(4)]
    assert shares == pytest.approx([0.5 / 0.95, 0.0, 0.3 / 0.95, 0.15 / 0.95], abs=1 / count)
    edge = 1 - 2**-53
    assert next_tokens(logits, TOKENS, sampling, [edge]) == [3]
    assert next_tokens(logits, TOKENS, sampling, [0.0]) == [0]


def test_draws_are_uniform_and_keyed():
    values = torch.tensor([draw(Sampling(seed=5), "prompt", place) for place in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert (values.histc(10, 0, 1) - 400).abs().max() < 5 * 19  # five standard deviations
    assert draw(Sampling(seed=5), "prompt", 0) == values[0]
    assert len({draw(Sampling(seed=s), p, i) for s in (5, 6) for p in ("a", "b") for i in (0, 1)}) == 8


def test_values_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"(?s)temperature is -1\.0.*top_p is 0\.0"):
        Sampling(temperature=-1.0, top_p=0.0)
    for temperature in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature"):
            Sampling(temperature=temperature)
