"""Cached decoding on one GPU: the same as recomputation, batched as alone, with both backends."""

from dataclasses import replace

import pytest
import recompute
import torch

from nemovl_train.config.schema import LanguageConfig, ModelConfig, ParallelConfig, TokenIds, VisionConfig
from nemovl_train.inference.generate import generate
from nemovl_train.inference.prompt import Prompt
from nemovl_train.model.cache import CachedParams, DecodingCache
from nemovl_train.model.vlm import NemotronVL, build_model
from nemovl_train.parallel.layout import Layout

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    name="one_layer_of_each_kind",
    language=LanguageConfig(hybrid_pattern="M-M*-", vocab_size=16384, base_vocab_size=16000),
    vision=VisionConfig(num_layers=2),
    tokens=TokenIds(image=16000, image_start=16001, image_end=16002, video=16009),
)
STEPS = 6


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for length, tiles in ((40, 0), (333, 1), (130, 0), (700, 2)):
        ids = torch.randint(100, 16000, (length,), generator=generator).tolist()
        pixels = torch.randint(0, 255, (tiles, 3, 512, 512), dtype=torch.uint8, generator=generator)
        images = [MODEL.tokens.image] * MODEL.tokens_per_tile
        start = [3 + i * MODEL.tokens_per_tile for i in range(tiles)]
        found.append(Prompt((*ids[:3], *images * tiles, *ids[3:]), pixels, tuple(start)))
    return found


@torch.no_grad()
def logits_of_steps(model: NemotronVL, prompt: Prompt, answer: list[int]) -> torch.Tensor:
    memory, device = DecodingCache(), model.layout.device
    features = model.encode_tiles(prompt.tiles.to(device)).flatten(0, 1) if len(prompt.tiles) else None
    found, new = [], list(prompt.input_ids)
    for token in answer:
        params = CachedParams.of(memory, [len(new)], len(new), device)
        last = torch.tensor([len(new) - 1], device=device)
        found.append(model.decode(torch.tensor(new, device=device), params, last, features))
        new, features = [token], None
    return torch.cat(found)


def test_fp32_is_recomputation(layout, prompts):
    model = build_model(MODEL, layout, params_dtype=torch.float32, backend="torch").eval()
    expected = [recompute.step_by_step(model, prompt, STEPS) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=STEPS) == [ids for ids, _ in expected]
    for prompt, (ids, wanted) in zip(prompts, expected, strict=True):
        found = logits_of_steps(model, prompt, ids)
        finite = torch.isfinite(wanted)
        assert (found - wanted)[finite].norm() <= 1e-5 * wanted[finite].norm()
        assert generate(model, [prompt], max_new_tokens=STEPS) == [ids]


def test_te_in_bf16_errs_no_more_than_recomputation_does(layout, prompts):
    """Against fp32 on the same rounded weights, the cache may err 1.5 times as much as the training forward."""
    te = build_model(MODEL, layout, params_dtype=torch.bfloat16, backend="te").eval()
    exact = build_model(MODEL, layout, params_dtype=torch.float32, backend="torch").eval()
    weights = dict(te.named_parameters())
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(weights[name])
    for prompt in prompts:
        ids, wanted = recompute.step_by_step(exact, prompt, STEPS)
        cached = logits_of_steps(te, prompt, ids)
        whole = torch.cat(
            [recompute.last_logits(te, [recompute.extended(prompt, ids[:step])]) for step in range(STEPS)]
        )
        finite = torch.isfinite(wanted)
        errors = [float((t - wanted)[finite].norm() / wanted[finite].norm()) for t in (cached, whole)]
        assert errors[0] <= 1.5 * errors[1], errors
        # A cache that forgot the prompt would be far off.
        short = replace(prompt, input_ids=prompt.input_ids[-3:], tiles=prompt.tiles[:0], tile_start=())
        forgot = logits_of_steps(te, short, ids)
        assert float((forgot - wanted)[finite].norm() / wanted[finite].norm()) > 10 * errors[0]
    assert len(generate(te, prompts, max_new_tokens=STEPS)) == len(prompts)
