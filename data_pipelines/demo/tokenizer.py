"""The demo's byte-level BPE: the released tokenizer's special ids at a fraction of its size."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.demo import (
    chart_qa,
    digits_count,
    digits_read,
    image_pair,
    long_facts,
    ocr_line,
    python_code,
    text,
    video_clip,
)
from data_pipelines.demo.keyed import TRAIN
from data_pipelines.demo.stdlib_text import modules
from data_pipelines.demo.words import WORDS
from data_pipelines.exceptions import DataError

BASE_VOCAB = 2560
SPECIALS = ("<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 13)))
"""Ids 0 to 12, as in the released tokenizer: unknown, start, then 10 system, 11 user and assistant, 12 end of turn."""

MEDIA_TAGS = ("<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")
"""Ids right after the base vocabulary, in this order (the released ones start at 131072)."""

# Reasoning marks, which precede every answer, in one piece each; digits alone, so that a number is read place by place
# and is the same token in a sentence and in an answer; then words and punctuation with their space, and white space.
_PIECES = r"<think></think>|<think>|</think>|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CORPUS_SEED = 0  # fixed: one tokenizer for every demo seed
_TEXT_SAMPLES = 2000
_PHRASE_REPEATS = 200


def train_demo_tokenizer(out: Path, *, base_vocab: int = BASE_VOCAB) -> None:
    """Trains on the standard library's sources and the demo's texts, and writes a Hugging Face tokenizer folder.

    The result is a function of the installed Python (its sources) and of the `tokenizers` release: bitwise equal on
    every run with the same two, not across them. The manifest of every dataset carries the tokenizer's hash.

    Args:
        out: Folder to write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` to.
        base_vocab: Ids before the media tags, special ids included.

    Raises:
        DataError: The texts give fewer tokens, or the bytes and special ids alone are more.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_vocab,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != base_vocab:
        raise DataError(
            f"base_vocab {base_vocab}: the nearest that the demo's texts can give is {tokenizer.get_vocab_size()}"
        )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in MEDIA_TAGS])
    _write(out, json.loads(tokenizer.to_str()), (*SPECIALS[10:], *MEDIA_TAGS))


def base_tokenizer(vlm_folder: Path, out: Path) -> None:
    """Writes the text-only language model's tokenizer: the same ids without the media tags.

    Args:
        vlm_folder: Folder written by `train_demo_tokenizer`.
        out: Folder to write to.
    """
    path = vlm_folder / "tokenizer.json"
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"no readable tokenizer at {path} ({error.strerror}); run: nemovl data make-demo") from error
    base_vocab = len(spec["model"]["vocab"])
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < base_vocab]
    _write(out, spec, SPECIALS[10:])


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, for measuring texts."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def corpus() -> Iterator[str]:
    """Training texts: the standard library, the demo's questions, and the fixed strings that the template writes."""
    yield from modules().values()
    for record, _ in text.generate(_CORPUS_SEED, _TEXT_SAMPLES, TRAIN):
        for message in record["messages"]:
            yield message["content"][-1]["text"]
    for _ in range(_PHRASE_REPEATS):
        yield from _phrases()


def _phrases() -> Iterator[str]:
    yield from ("System\n\n", "User\n", "Assistant\n", "<think></think>", "<think>\n", "</think>\n")
    yield from ("<image 1> <image 2> ", *(f"Frame {i} sampled at {i / 2:.2f} seconds: " for i in range(1, 9)))
    asked = (digits_read, digits_count, ocr_line, image_pair, python_code, long_facts)
    yield from itertools.chain.from_iterable(module.QUESTIONS for module in asked)
    for table in (chart_qa.QUESTIONS, video_clip.QUESTIONS):
        yield from itertools.chain.from_iterable(table.values())
    yield from (*video_clip.DIRECTIONS, *video_clip.COLOURS, *WORDS, "yes", "no", "first", "second")
    yield from (long_facts.FACT.format(thing=thing, number=0, code=0) for thing in long_facts.THINGS)


def _write(out: Path, spec: dict[str, Any], additional: tuple[str, ...]) -> None:
    named = {"bos_token": "<s>", "eos_token": "<SPECIAL_12>", "unk_token": "<unk>"}
    names = {**named, "additional_special_tokens": [name for name in additional if name not in named.values()]}
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    decoder = {str(token["id"]): {key: token[key] for key in keys} for token in spec["added_tokens"]}
    config = {
        "added_tokens_decoder": decoder,
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("tokenizer.json", spec),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
    ):
        (out / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
