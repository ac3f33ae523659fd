"""Cached decoding: each prompt as if it were alone, each token as a full forward pass chooses it."""

from dataclasses import replace

import pytest
import recompute
import small_vlm
import torch

from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.inference.generate import generate
from nemovl_train.inference.prompt import Prompt, build_prompt
from nemovl_train.inference.sampling import Sampling, without_images
from nemovl_train.model import cache
from nemovl_train.model.cache import CachedParams, DecodingCache
from nemovl_train.model.vlm import NemotronVL, build_model
from nemovl_train.parallel.layout import Layout

STEPS = 8


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    layout = Layout.create(ParallelConfig())
    yield small_vlm.build(layout)
    layout.destroy()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(small_vlm.write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer"))


@pytest.fixture(scope="module")
def prompts(tokenizer: TextTokenizer) -> list[Prompt]:
    """Lengths that divide nothing; no image, one of several tiles with its thumbnail, and two."""
    sizes = [[], [(150, 70)], [], [(64, 64), (64, 130)]]
    out = []
    for number, pictures in enumerate(sizes):
        record = small_vlm.question("what is this? " * (1 + 3 * number), images=len(pictures))
        media = {f"{i}.png": small_vlm.picture(10 * number + i, *size) for i, size in enumerate(pictures)}
        out.append(build_prompt(record, media, tokenizer, small_vlm.RULES))
    assert [len(prompt.tile_start) for prompt in out] == [0, 3, 0, 1 + 3]
    return out


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[tuple[list[int], torch.Tensor]]:
    return [recompute.step_by_step(model, prompt, STEPS) for prompt in prompts]


def cached_logits(model: NemotronVL, prompts: list[Prompt], answers: list[list[int]]) -> torch.Tensor:
    """Logits of every step when the given answers are fed in: [M, count, V]."""
    memory = DecodingCache()
    tiles = torch.cat([prompt.tiles for prompt in prompts])
    features = model.encode_tiles(tiles).flatten(0, 1) if len(tiles) else None
    new = [list(prompt.input_ids) for prompt in prompts]
    found = []
    for step in range(len(answers[0])):
        lengths = [len(ids) for ids in new]
        size = sum(lengths) + 3 * (step % 2)  # padding behind the documents changes nothing
        ids = torch.tensor([i for row in new for i in row] + [0] * (size - sum(lengths)))
        last = torch.tensor(lengths).cumsum(0) - 1
        params = CachedParams.of(memory, lengths, size, torch.device("cpu"))
        logits = model.decode(ids, params, last, None if step else features)
        found.append(without_images(logits, model.sizes.tokens))
        new = [[answer[step]] for answer in answers]
    return torch.stack(found, dim=1)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, over everything but the image token that neither can choose."""
    finite = torch.isfinite(wanted)
    return float((found[finite] - wanted[finite]).norm() / wanted[finite].norm())


@torch.no_grad()
def test_cached_logits_are_those_of_recomputation(model, prompts, expected):
    found = cached_logits(model, prompts, [ids for ids, _ in expected])
    for row, (_, wanted) in zip(found, expected, strict=True):
        assert difference(row, wanted) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("lost", ["keys", "values", "taps", "state"])
def test_each_part_of_the_cache_matters(lost, model, prompts, expected, monkeypatch):
    """Forgetting one part after the fill moves the next logits by a thousand times what rounding does."""
    answers = [ids[:2] for ids, _ in expected]
    of = CachedParams.of

    def forgetting(memory, new, size, device):
        for layer in (*memory.attention.values(), *memory.mamba.values()):
            if hasattr(layer, lost):
                getattr(layer, lost).zero_()
        return of(memory, new, size, device)

    monkeypatch.setattr(CachedParams, "of", forgetting)
    found = cached_logits(model, prompts, answers)
    for row, (_, wanted) in zip(found, expected, strict=True):
        assert difference(row[0], wanted[0]) < 2e-6
        assert difference(row[1], wanted[1]) > 1e-3


def test_generation_is_the_argmax_of_a_full_forward_at_every_step(model, prompts, expected):
    ids = [ids for ids, _ in expected]
    assert len({tuple(row) for row in ids}) > 1
    assert not any(small_vlm.CONFIG.tokens.eos in row for row in ids)
    assert generate(model, prompts, max_new_tokens=STEPS) == ids
    assert generate(model, prompts[:1], max_new_tokens=3) == [ids[0][:3]]
    assert generate(model, []) == []


@torch.no_grad()
def test_batched_is_as_alone(model, prompts, expected):
    answers = [ids for ids, _ in expected]
    together = cached_logits(model, prompts, answers)
    turned = cached_logits(model, prompts[::-1], answers[::-1]).flip(0)
    assert difference(turned, together) < 2e-6
    for number, prompt in enumerate(prompts):
        assert difference(together[number], cached_logits(model, [prompt], [answers[number]])[0]) < 2e-6
    # Documents that see each other would be found: a neighbour's first token in place of its own changes a lot.
    assert difference(together[0], together[1]) > 1e-1


def test_room_for_keys_grows(model, prompts, expected, monkeypatch):
    monkeypatch.setattr(cache, "GROWTH", 3)
    assert generate(model, prompts, max_new_tokens=STEPS) == [ids for ids, _ in expected]


def test_a_long_prompt_is_scanned_in_pieces(model, prompts, expected, monkeypatch):
    monkeypatch.setattr(cache.MambaSizes, "longest_piece", 32)
    assert generate(model, prompts, max_new_tokens=STEPS) == [ids for ids, _ in expected]


def test_images_reach_the_answer(model, prompts):
    prompt = prompts[1]
    other = replace(prompt, tiles=255 - prompt.tiles)
    moved = recompute.last_logits(model, [prompt]) - recompute.last_logits(model, [other])
    assert moved.abs().max() > 1e-2
    assert generate(model, [prompt, other], max_new_tokens=1)[1] == [recompute.step_by_step(model, other, 1)[0][0]]


def test_the_end_of_turn_stops_one_prompt_and_not_the_others(model, prompts, monkeypatch):
    free = generate(model, prompts, max_new_tokens=STEPS)
    # A token that some answers hold, behind their first, plays the end of turn.
    end = next(i for i in free[0][1:] if i != free[0][0] and not all(i in ids for ids in free))
    stopped = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    assert 0 < len(stopped[0]) < max(map(len, stopped)) == STEPS
    assert generate(model, prompts, max_new_tokens=STEPS, stop=[end]) == stopped
    monkeypatch.setattr(model, "sizes", replace(model.sizes, tokens=replace(model.sizes.tokens, eos=end)))
    assert generate(model, prompts, max_new_tokens=STEPS) == stopped


def test_batches_are_cut_where_they_would_be_too_large(model, prompts, expected, monkeypatch):
    passes = []
    real = NemotronVL.decode

    def counted(self, ids, *rest):
        passes.append(len(ids))
        return real(self, ids, *rest)

    monkeypatch.setattr(NemotronVL, "decode", counted)
    for limits in ({"MAX_PROMPTS": 3}, {"MAX_TOKENS": 100}):
        for name, value in limits.items():
            monkeypatch.setattr(f"nemovl_train.inference.generate.{name}", value)
        passes.clear()
        assert generate(model, prompts, max_new_tokens=2) == [ids[:2] for ids, _ in expected]
        assert len(passes) > 2


def test_draws_do_not_depend_on_neighbours(model, prompts):
    sampling = Sampling(temperature=1.5, seed=3)
    together = generate(model, prompts, max_new_tokens=STEPS, sampling=sampling)
    alone = [generate(model, [p], max_new_tokens=STEPS, sampling=sampling)[0] for p in prompts]
    assert together == alone
    assert generate(model, prompts, max_new_tokens=STEPS, sampling=replace(sampling, seed=4)) != together
    nearly_greedy = Sampling(temperature=1.5, top_p=1e-9)
    assert generate(model, prompts, max_new_tokens=STEPS, sampling=nearly_greedy) == generate(
        model, prompts, max_new_tokens=STEPS
    )


def test_rotary_positions_go_on(model, prompts):
    """The predecessor's kind of layers: attention alone, with angles by the place in the document."""
    language = replace(small_vlm.CONFIG.language, hybrid_pattern="*-*-", position="rope", activation="swiglu")
    config = replace(small_vlm.CONFIG, language=replace(language, init_std=0.3), parts=("language",))
    other = build_model(config, model.layout, params_dtype=torch.float32).eval()
    texts = [prompts[0], prompts[2]]
    expected = [recompute.step_by_step(other, prompt, STEPS) for prompt in texts]
    found = cached_logits(other, texts, [ids for ids, _ in expected])
    for row, (_, wanted) in zip(found, expected, strict=True):
        assert difference(row, wanted) < 2e-6
    assert len({*expected[0][0]}) > 2
