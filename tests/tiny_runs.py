"""A run that takes milliseconds a step: a model of every kind of layer, a tokenizer of 330 ids, text and pictures."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.config import DataConfig, LossWeightConfig, SourceConfig
from data_pipelines.shards import write_dataset
from nemovl_train.config.schema import (
    CheckpointConfig,
    EvalConfig,
    LanguageConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    ProjectorConfig,
    RunConfig,
    RunSection,
    TokenIds,
    TrainerConfig,
    VisionConfig,
)

BASE_VOCAB = 320
TAGS = ("<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")
RULES = {"tile_size": 64, "max_tiles": 2, "video_fps": 2.0, "max_frames": 4}

MODEL = ModelConfig(
    name="mini",
    language=LanguageConfig(
        hidden_size=32,
        hybrid_pattern="M*-",
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        ffn_hidden_size=48,
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_state_dim=8,
        mamba_num_groups=2,
        chunk_size=32,
        max_position=512,
        vocab_size=BASE_VOCAB + 16,
        base_vocab_size=BASE_VOCAB,
    ),
    vision=VisionConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=2,
        ffn_hidden_size=32,
        tile_size=64,
        max_resolution=128,
        prefix_tokens=4,
    ),
    projector=ProjectorConfig(ffn_hidden_size=40),
    tokens=TokenIds(image=BASE_VOCAB, image_start=BASE_VOCAB + 1, image_end=BASE_VOCAB + 2, video=BASE_VOCAB + 9),
)


def write_tokenizer(folder: Path, tags: tuple[str, ...] = TAGS) -> Path:
    """Bytes, a few merges and the special tokens where the released tokenizer has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 16))]
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "User Assistant System think answer number question picture describe colour red green blue seven eleven"
    tokenizer.train_from_iterator([words] * 5, trainer)
    assert tokenizer.get_vocab_size() == BASE_VOCAB
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _samples(kind: str, first: int, count: int) -> list:
    samples = []
    for i in range(first, first + count):
        text = {"type": "text", "text": f"number {i}? " * (1 + i % 4)}
        media = {"image0.png": _picture(i)} if kind == "pictures" else {}
        content = [{"type": "image", "image": name} for name in media] + [text]
        messages = [{"role": "user", "content": content}]
        messages.append({"role": "assistant", "content": f"answer {i % 7} " * (1 + i % 5)})
        if i % 3 == 0:
            messages += [{"role": "user", "content": "again?"}, {"role": "assistant", "content": "seven"}]
        samples.append(({"id": f"{kind}-{i}", "messages": messages}, media))
    return samples


def write_data(root: Path) -> Path:
    """`tokenizer/`, and the datasets `text` and `pictures` with splits `train` and `heldout`."""
    tokenizer = write_tokenizer(root / "tokenizer")
    for kind in ("text", "pictures"):
        splits = {"train": _samples(kind, 0, 40), "heldout": _samples(kind, 100, 6)}
        write_dataset(root / kind, splits, name=kind, tokenizer=tokenizer, **RULES)
    return root


def run_config(data: Path, root: Path, *, sources: tuple[str, ...] = ("text", "pictures"), **trainer) -> RunConfig:
    """Six steps of two packs of 128 tokens."""
    return RunConfig(
        run=RunSection(name="mini", stage="train", root=str(root)),
        model=MODEL,
        data=DataConfig(
            sources={name: SourceConfig(path=str(data / name)) for name in sources},
            tokenizer=str(data / "tokenizer"),
            seq_length=128,
            window_samples=16,
            max_seqlen_bucket=32,
            loss=LossWeightConfig(mode="square", unit="sample"),
            **RULES,
        ),
        precision=PrecisionConfig(params="fp32", backend="torch"),
        optim=OptimConfig(lr=3e-3, weight_decay=0.1),
        trainer=TrainerConfig(**{"steps": 6, "global_batch": 2, **trainer}),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=3),
        logging=LoggingConfig(progress=False),
    )


def with_evaluation(config: RunConfig, data: Path) -> RunConfig:
    """The same run with its held-out pictures scored at the end."""
    options = EvalConfig(sources={"pictures": str(data / "pictures")}, seq_length=256, max_samples=4, predictions=1)
    return replace(config, evaluation=options)
