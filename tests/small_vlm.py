"""A small vision-language model with random weights and a tokenizer of its own, for tests that ask and answer."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.media.rules import RenderRules
from nemovl_train.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, TokenIds, VisionConfig
from nemovl_train.convert.checkpoints import load_tensors
from nemovl_train.convert.names import Precision, table
from nemovl_train.model.vlm import NemotronVL, build_model
from nemovl_train.parallel.layout import Layout

WORDS = "Frame sampled at seconds: User Assistant System think what is this picture which digit the image shows a one "
MEDIA_TAGS = ("<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")
BASE = 320
CONFIG = ModelConfig(
    name="test-small",
    language=LanguageConfig(
        hidden_size=48,
        hybrid_pattern="M-*-M",
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=12,
        ffn_hidden_size=64,
        mamba_num_heads=8,
        mamba_head_dim=8,
        mamba_state_dim=16,
        mamba_num_groups=2,
        chunk_size=32,
        max_position=512,
        vocab_size=BASE + 16,
        base_vocab_size=BASE,
    ),
    vision=VisionConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=3,
        ffn_hidden_size=48,
        tile_size=64,
        max_resolution=128,
        prefix_tokens=8,
    ),
    projector=ProjectorConfig(ffn_hidden_size=40),
    tokens=TokenIds(image=BASE, image_start=BASE + 1, image_end=BASE + 2, video=BASE + 9, pad=0, bos=1, eos=12),
)
RULES = RenderRules(template="nano_v2_vl", tile_size=64, max_tiles=4, use_thumbnail=True, video_fps=2.0, max_frames=8)


def write_tokenizer(folder: Path, *, media: bool = True) -> Path:
    """A byte-level BPE with the released special ids; without media tags it is a text-only model's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 16))],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    assert tokenizer.get_vocab_size() == BASE
    if media:
        tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in MEDIA_TAGS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def weights(kind: str = "vlm") -> dict[str, torch.Tensor]:
    """Canonical tensors large enough, and states slow enough, that the next token depends on all before it."""
    generator = torch.Generator().manual_seed(11)
    out = {}
    for entry in table(CONFIG, kind):
        value = torch.randn(entry.shape, generator=generator) * 0.4
        if entry.ours.endswith("dt_bias"):
            value = value - 4.0
        elif len(entry.shape) == 1 and not entry.ours.endswith("bias"):
            value = value + 1.0
        out[entry.ours] = value if entry.precision is Precision.STATE else value.float()
    return out


def build(layout: Layout) -> NemotronVL:
    """The model with `weights`, in evaluation mode."""
    model = build_model(CONFIG, layout, params_dtype=torch.float32)
    load_tensors(model, weights().items())
    return model.eval()


def picture(seed: int, width: int = 64, height: int = 64) -> bytes:
    """A PNG that differs from the others in every patch."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def clip(frames: int) -> bytes:
    """Noise that stands still but for a square that wanders."""
    import av

    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            pixels[8 * i : 8 * i + 8] = 255 - pixels[8 * i : 8 * i + 8]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def question(text: str, *, images: int = 0, answer: str | None = None, key: str = "q") -> dict[str, Any]:
    """A record with its images before the text; without an answer it is a prompt."""
    items: list[dict[str, Any]] = [{"type": "image", "image": f"{i}.png"} for i in range(images)]
    messages = [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"id": key, "messages": messages}
