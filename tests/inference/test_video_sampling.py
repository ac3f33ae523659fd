"""Efficient Video Sampling, generation and training: what the language model sees, and that rate 0 changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
import small_vlm
import torch

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.loader import heldout_packs
from data_pipelines.shards import write_dataset
from data_pipelines.template import frame_label
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.exceptions import DataError
from nemovl_train.inference.generate import _see, generate
from nemovl_train.inference.prompt import Prompt, build_prompt
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.evs import retained, tokens_kept
from nemovl_train.model.packing import PackParams
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout

TOKENS = small_vlm.CONFIG.tokens
FRAMES = 8


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    layout = Layout.create(ParallelConfig())
    yield small_vlm.build(layout)
    layout.destroy()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(small_vlm.write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer"))


def question(answer: str | None = None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A record with an image, and a video behind it; its media."""
    metadata = {"video_width": 64, "video_height": 64, "video_fps": 2.0, "video_num_frames": FRAMES}
    items = [
        {"type": "video", "video": "v", "metadata": metadata},
        {"type": "image", "image": "i"},
        {"type": "text", "text": "<image> and <video>: what is this?"},
    ]
    messages = [{"role": "user", "content": items}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"id": "q", "messages": messages}, {"v": small_vlm.clip(FRAMES), "i": small_vlm.picture(3)}


@pytest.fixture(scope="module")
def prompt(tokenizer: TextTokenizer) -> Prompt:
    found = build_prompt(*question(), tokenizer, small_vlm.RULES)
    assert found.videos == (range(1, 1 + FRAMES),)
    return found


def first_pass(model, prompt, rate, monkeypatch):
    """Ids, features and logits of the pass over the prompt."""
    seen = []
    real = NemotronVL.decode

    def spied(self, ids, params, last, features=None):
        logits = real(self, ids, params, last, features)
        seen.append((ids, features, logits))
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(NemotronVL, "decode", spied)
        answer = generate(model, [prompt], max_new_tokens=4, video_pruning_rate=rate)[0]
    return *seen[0], answer


def training_batch(model, tokenizer, folder, rate) -> PackBatch:
    """The same question with an answer, as a training pack of its own."""
    record, media = question(answer="Something that moves.")
    options = {"tile_size": 64, "max_tiles": 4, "max_frames": FRAMES, "video_pruning_rate": rate}
    write_dataset(folder, {"train": [(record, media)]}, name="d", tokenizer=tokenizer.path.parent, **options)
    config = DataConfig(
        sources={"d": SourceConfig(path=str(folder))}, tokenizer=str(tokenizer.path.parent), seq_length=320, **options
    )
    packs = list(heldout_packs(config, tokens_per_tile=small_vlm.RULES.tokens_per_tile, split="train"))
    assert len(packs) == 1
    return PackBatch.from_pack(packs[0], model.layout)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_training_sees_what_generation_sees(rate, model, prompt, tokenizer, tmp_path):
    """Tokens and features of the question to the last bit; losses and gradients of the whole chain written out."""
    batch = training_batch(model, tokenizer, tmp_path / "d", rate)
    language, seen = model.language_model, _see(model, prompt, rate)
    length = len(seen.input_ids)
    with torch.no_grad():
        expected = language.embed(seen.input_ids)
        expected[seen.input_ids == TOKENS.image] = seen.features.unsqueeze(1)
        assert torch.equal(model._embeddings(batch)[:length], expected)
    assert (batch.labels >= 0).any()
    assert (batch.labels[: int((seen.input_ids == TOKENS.image).nonzero()[-1]) + 1] < 0).all()

    losses = model(batch)
    losses.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    features = model.encode_tiles(batch.tiles)
    kept = torch.cat([torch.ones_like(features[:1, :, 0], dtype=torch.bool), retained(features[1:].detach(), rate)])
    ids = batch.pack.input_ids.clone()
    ids[:length] = seen.input_ids
    embeddings = language.embed(ids)
    rows = (ids == TOKENS.image).nonzero()[:, 0]
    embeddings = embeddings.index_copy(0, rows, features[kept].unsqueeze(1))
    logits = language.logits(language.hidden_states(embeddings, batch.params))
    torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 2e-5 * parameter.grad.norm() + 1e-9, name
    model.zero_grad(set_to_none=True)


def test_a_rate_that_drops_nothing_is_off_to_the_last_bit(model, tokenizer, tmp_path):
    off = training_batch(model, tokenizer, tmp_path / "d", 0.0)
    assert off.pack.tile_tokens is None
    every = torch.full_like(off.pack.tile_token_start, small_vlm.RULES.tokens_per_tile)
    through = PackBatch.from_pack(replace(off.pack, tile_tokens=every), model.layout)
    found = []
    for batch in (off, through):
        losses = model(batch)
        losses.sum().backward()
        found.append([losses.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_more_places_than_features_are_refused(model, tokenizer, tmp_path):
    batch = training_batch(model, tokenizer, tmp_path / "d", 0.5)
    more = batch.pack.tile_tokens.clone()
    more[-1] += 1
    with pytest.raises(DataError, match=r"'q' has \d+ image tokens .* but 9 tiles, which give \d+ visual features"):
        model(PackBatch.from_pack(replace(batch.pack, tile_tokens=more), model.layout))


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.5, 0.7, 0.75, 0.9])
def test_only_kept_tokens_are_seen(rate, model, prompt, tokenizer, monkeypatch):
    ids, features, logits, answer = first_pass(model, prompt, rate, monkeypatch)
    per_tile = small_vlm.RULES.tokens_per_tile
    every = model.encode_tiles(prompt.tiles)
    kept = retained(every[1:], rate)
    assert torch.equal(features, torch.cat([every[0], every[1:][kept]]))
    # By hand: the words and tags of every frame stay, also of one that keeps no token.
    expected = list(prompt.input_ids[: prompt.tile_start[0] + per_tile])
    for frame in range(FRAMES):
        start = prompt.tile_start[1 + frame]
        expected += prompt.input_ids[len(expected) + (per_tile * frame - int(kept[:frame].sum())) : start]
        expected += [TOKENS.image] * int(kept[frame].sum())
    expected += prompt.input_ids[prompt.tile_start[-1] + per_tile :]
    assert ids.tolist() == expected
    assert ids.tolist().count(TOKENS.image_start) == 1 + FRAMES
    assert len(prompt.input_ids) - len(ids) == FRAMES * per_tile - tokens_kept(FRAMES, per_tile, rate)
    assert frame_label(FRAMES - 1, 3.5).strip() in tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    # The model's own forward over these ids and features.
    embeddings = model.language_model.embed(ids)
    embeddings[ids == TOKENS.image] = features.unsqueeze(1)
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    pack = PackParams.from_boundaries(bounds, torch.zeros(1, len(ids), dtype=torch.int32), len(ids))
    whole = model.language_model.logits(model.language_model.hidden_states(embeddings, pack))[-1:]
    assert (whole - logits).norm() <= 2e-6 * whole.norm()
    assert answer


def test_rate_zero_changes_nothing(model, prompt, monkeypatch):
    ids, features, logits, answer = first_pass(model, prompt, 0.0, monkeypatch)
    assert ids.tolist() == list(prompt.input_ids)
    assert answer == generate(model, [prompt], max_new_tokens=4)[0]
    # Nor does the rule itself, where it runs and keeps everything.
    monkeypatch.setattr("nemovl_train.model.evs.tokens_kept", lambda frames, tokens, rate: frames * tokens)
    same = first_pass(model, prompt, 0.5, monkeypatch)
    assert torch.equal(same[0], ids)
    assert torch.equal(same[1], features)
    assert torch.equal(same[2], logits)
    monkeypatch.undo()
    pruned = first_pass(model, prompt, 0.75, monkeypatch)
    assert (pruned[2] - logits).abs().max() > 1e-3
