"""Cached decoding on one GPU: the same as recomputation, batched as alone, with both backends.

What takes time on a cold machine is compiling Triton kernels, a second or so for each form of each of them. Values are
drawn on the GPU, both tests share one fp32 model, and every prompt is of an odd length or padded to a multiple of 64,
so that kernels have few forms.
"""

from collections.abc import Sequence
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
LENGTHS_AND_TILES = ((41, 0), (333, 1), (131, 0), (701, 2))
STEPS = 4


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.fixture(scope="module")
def te(layout) -> NemotronVL:
    """The model in bf16 with Transformer Engine."""
    return build_model(MODEL, layout, params_dtype=torch.bfloat16, backend="te", draw_on=layout.device).eval()


@pytest.fixture(scope="module")
def exact(layout, te) -> NemotronVL:
    """The same rounded weights in fp32."""
    model = build_model(MODEL, layout, params_dtype=torch.float32, backend="torch", draw_on=layout.device)
    weights = dict(te.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for length, tiles in LENGTHS_AND_TILES:
        ids = torch.randint(100, 16000, (length,), generator=generator).tolist()
        pixels = torch.randint(0, 255, (tiles, 3, 512, 512), dtype=torch.uint8, generator=generator)
        images = [MODEL.tokens.image] * MODEL.tokens_per_tile
        start = [3 + i * MODEL.tokens_per_tile for i in range(tiles)]
        found.append(Prompt((*ids[:3], *images * tiles, *ids[3:]), pixels, tuple(start)))
    return found


@pytest.fixture(scope="module")
def expected(exact, prompts) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy ids and logits of every prompt, each token by a forward pass of its own."""
    return [recompute.step_by_step(exact, prompt, STEPS) for prompt in prompts]


@torch.no_grad()
def logits_of_steps(
    model: NemotronVL, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits [STEPS, V] of each prompt where the answers are given, all prompts in one cache."""
    memory, device = DecodingCache(), model.layout.device
    features = [model.encode_tiles(p.tiles.to(device)).flatten(0, 1) for p in prompts if len(p.tiles)]
    new, found = [list(prompt.input_ids) for prompt in prompts], []
    for step in range(STEPS):
        lengths = [len(ids) for ids in new]
        params = CachedParams.of(memory, lengths, sum(lengths), device)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        ids = torch.tensor([i for row in new for i in row], device=device)
        found.append(model.decode(ids, params, last, torch.cat(features) if features and not step else None))
        new = [[answer[step]] for answer in answers]
    return list(torch.stack(found, dim=1))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm, where logits are finite (image tokens are never drawn)."""
    finite = torch.isfinite(wanted)
    return float((found - wanted)[finite].norm() / wanted[finite].norm())


def test_fp32_is_recomputation_and_batched_is_alone(exact, prompts, expected, record):
    answers = [ids for ids, _ in expected]
    assert generate(exact, prompts, max_new_tokens=STEPS) == answers
    together = logits_of_steps(exact, prompts, answers)
    for prompt, (ids, wanted), batched in zip(prompts, expected, together, strict=True):
        (alone,) = logits_of_steps(exact, [prompt], [ids])
        name = f"decoding fp32, {len(ids)} tokens after {len(prompt.input_ids)}"
        for kind, difference in (
            ("cached to recomputed", error(alone, wanted)),
            ("batched to alone", error(batched, alone)),
        ):
            record(f"{name}, {kind}", difference, 1e-5)
            assert difference <= 1e-5
    assert generate(exact, prompts[1:2], max_new_tokens=STEPS) == answers[1:2]


def test_te_in_bf16_errs_no_more_than_recomputation_does(te, prompts, expected, record):
    """Against fp32 on the same rounded weights, the cache may err 1.5 times as much as the training forward."""
    together = logits_of_steps(te, prompts, [ids for ids, _ in expected])
    for prompt, (ids, wanted), batched in zip(prompts, expected, together, strict=True):
        (alone,) = logits_of_steps(te, [prompt], [ids])
        extended = [recompute.extended(prompt, ids[:step]) for step in range(STEPS)]
        whole = torch.cat([recompute.last_logits(te, [longer]) for longer in extended])
        bound = 1.5 * error(whole, wanted)
        for kind, logits in (("alone", alone), ("batched", batched)):
            record(f"decoding bf16 {kind} after {len(prompt.input_ids)}", error(logits, wanted), bound)
            assert error(logits, wanted) <= bound
        # A cache that forgot the prompt would be far off.
        short = replace(prompt, input_ids=prompt.input_ids[-3:], tiles=prompt.tiles[:0], tile_start=())
        (forgot,) = logits_of_steps(te, [short], [ids])
        assert error(forgot, wanted) > 10 * error(alone, wanted)
    assert len(generate(te, prompts, max_new_tokens=STEPS)) == len(prompts)
