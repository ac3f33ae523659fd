"""Efficient Video Sampling in generation: what the language model sees, and that rate 0 changes nothing."""

import io

import av
import numpy as np
import pytest
import small_vlm
import torch

from data_pipelines.template import frame_label
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.inference.generate import generate
from nemovl_train.inference.prompt import Prompt, build_prompt
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


def clip() -> bytes:
    """Noise that stands still but for a square that wanders."""
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(FRAMES):
            pixels[8 * i : 8 * i + 8] = 255 - pixels[8 * i : 8 * i + 8]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.fixture(scope="module")
def prompt(tokenizer: TextTokenizer) -> Prompt:
    """An image, and the video behind it."""
    metadata = {"video_width": 64, "video_height": 64, "video_fps": 2.0, "video_num_frames": FRAMES}
    items = [
        {"type": "video", "video": "v", "metadata": metadata},
        {"type": "image", "image": "i"},
        {"type": "text", "text": "<image> and <video>: what is this?"},
    ]
    record = {"id": "q", "messages": [{"role": "user", "content": items}]}
    found = build_prompt(record, {"v": clip(), "i": small_vlm.picture(3)}, tokenizer, small_vlm.RULES)
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
