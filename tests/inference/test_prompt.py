"""Prompts: what training saw up to where the model answers."""

from pathlib import Path

import pytest
import small_vlm

from data_pipelines.manifest import media_shape
from data_pipelines.media.rules import lay_out
from data_pipelines.schema import media_items
from data_pipelines.template import encode_record
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.inference.prompt import build_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(small_vlm.write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer"))


def test_prompt_places_tiles_where_training_does(tokenizer):
    """Media in another order than the text's: the prompt is a prefix of the training sample, tiles included."""
    items = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "first <image> then <image>?"},
    ]
    record = {"id": "r", "messages": [{"role": "user", "content": items}, {"role": "assistant", "content": "one"}]}
    media = {"a.png": small_vlm.picture(1, 130, 64), "b.png": small_vlm.picture(2)}
    prompt = build_prompt(record, media, tokenizer, small_vlm.RULES)
    shapes = [media_shape(item, media[item.member]) for item in media_items(record)]
    layouts = [lay_out(s, small_vlm.RULES, max_tiles=4, max_frames=8) for s in shapes]
    sample = encode_record(record, layouts, tokenizer, tokens_per_tile=small_vlm.RULES.tokens_per_tile)
    assert sample.input_ids[: len(prompt.input_ids)].tolist() == list(prompt.input_ids)
    assert sample.tile_start.tolist() == list(prompt.tile_start)
    assert prompt.tiles.shape == (3 + 1, 3, 64, 64)


@pytest.mark.parametrize(
    ("turns", "images"),
    [
        (("what is this?",), 0),
        (("what is this?",), 2),
        (("which? /think",), 1),
        (("what is this?", "one", "the digit?"), 1),
        (("what? /think", "<think>\nwhy\n</think>one", "the digit? /no_think", "a", "is this one?"), 1),
    ],
    ids=["text", "two images", "reasoning", "two turns", "three turns"],
)
def test_prompt_ids_are_those_of_the_exported_chat_template(turns, images, tokenizer, tmp_path):
    """Transformers' rendering of the exported folder, tags expanded as its processor does, gives the same ids."""
    from transformers import PreTrainedTokenizerFast

    from nemovl_train.convert.hf_config import write_config

    (tmp_path / "hf").mkdir()
    folder = Path(tokenizer.path).parent
    write_config(small_vlm.CONFIG, tmp_path / "hf", kind="vlm", dtype="float32", tokenizer=folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf", local_files_only=True)
    record = small_vlm.question(turns[0], images=images)
    roles = ("assistant", "user")
    record["messages"] += [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns[1:])]
    media = {f"{i}.png": small_vlm.picture(i) for i in range(images)}
    text = theirs.apply_chat_template(record["messages"], tokenize=False, add_generation_prompt=True)
    tokens_per_tile = small_vlm.RULES.tokens_per_tile
    text = text.replace("<image>", f"<img>{'<image>' * tokens_per_tile}</img>")
    ours = build_prompt(record, media, tokenizer, small_vlm.RULES).input_ids
    assert theirs(text, add_special_tokens=False).input_ids == list(ours)
