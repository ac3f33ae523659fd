"""A tiny tokenizer, small media and a small mixed dataset for the tests of the data side."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.shards import Sample, write_dataset
from data_pipelines.tokenizer import TextTokenizer

TILE = 64
TOKENS_PER_TILE = 4
MEDIA_TAGS = ("<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def train_tokenizer(folder: Path, words: str) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 16))]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words] * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in MEDIA_TAGS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(
        tmp_path_factory.mktemp("text") / "tok", "Frame sampled at seconds: User Assistant System think"
    )


@pytest.fixture(scope="session")
def other_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("other") / "tok", "entirely different words to merge into tokens")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Bytes of a smooth random image."""

    def make(width: int, height: int, kind: str = "PNG", seed: int = 0, **options: Any) -> bytes:
        small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, kind, **options)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def clip() -> Callable[..., bytes]:
    """Bytes of a video whose frame i is grey with brightness 2 i."""
    import av

    def make(frames: int = 40, fps: int = 10, side: int = 32) -> bytes:
        out = io.BytesIO()
        with av.open(out, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=fps)
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            for i in range(frames):
                pixels = np.full((side, side, 3), 2 * i, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def record() -> Callable[..., dict[str, Any]]:
    """A record with one question and answer."""

    def make(key: str, question: str, answer: str, images: int = 0, videos: int = 0, **text: Any) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "image", "image": f"image{i}.png"} for i in range(images)]
        content += [{"type": "video", "video": f"video{i}.mp4"} for i in range(videos)]
        content.append({"type": "text", "text": question, **text})
        return {
            "id": key,
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        }

    return make


@pytest.fixture(scope="session")
def mixed_samples(record: Callable, picture: Callable, clip: Callable) -> Callable[[int], list[Sample]]:
    """Text, one-image, two-image and video samples of very different lengths."""
    video = clip()

    def make(count: int) -> list[Sample]:
        samples: list[Sample] = []
        for i in range(count):
            answer = f"answer {i} " * (1 + i % 5)
            if i % 4 == 0:
                samples.append((record(f"text-{i}", f"question {i} " * (1 + i % 7), answer), {}))
            elif i % 4 == 1:
                media = {"image0.png": picture(40 + 13 * i % 150, 50, seed=i)}
                samples.append((record(f"image-{i}", "what?", answer, images=1), media))
            elif i % 4 == 2:
                media = {f"image{k}.png": picture(60, 60, "JPEG", seed=i + k) for k in range(2)}
                samples.append((record(f"two-{i}", "compare", answer, images=2), media))
            else:
                samples.append((record(f"video-{i}", "when?", answer, videos=1), {"video0.mp4": video}))
        return samples

    return make


@pytest.fixture(scope="session")
def rules_options() -> dict[str, Any]:
    return {"tile_size": TILE, "max_tiles": 4, "video_fps": 2.0, "max_frames": 8}


@pytest.fixture(scope="session")
def write(tokenizer_folder: Path, rules_options: dict[str, Any]) -> Callable[..., Path]:
    """Write a dataset with the test's tokenizer and rules."""

    def make(out: Path, samples: list[Sample], split: str = "train", **options: Any) -> Path:
        settings = {"name": out.name, "tokenizer": tokenizer_folder, **rules_options, **options}
        return write_dataset(out, {split: samples}, **settings)

    return make


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory, write: Callable, mixed_samples: Callable) -> Path:
    return write(tmp_path_factory.mktemp("data") / "mixed", mixed_samples(60))


@pytest.fixture(scope="session")
def configure(tokenizer_folder: Path, rules_options: dict[str, Any]) -> Callable[..., DataConfig]:
    """A DataConfig over folders: name -> path."""

    def make(folders: dict[str, Path], **options: Any) -> DataConfig:
        sources = {name: SourceConfig(path=str(path)) for name, path in folders.items()}
        settings = {
            "sources": sources,
            "tokenizer": str(tokenizer_folder),
            "seq_length": 400,
            "window_samples": 32,
            "max_seqlen_bucket": 64,
            **rules_options,
            **options,
        }
        return DataConfig(**settings)

    return make
