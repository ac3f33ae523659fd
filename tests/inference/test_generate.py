"""Greedy generation: each prompt as if it were alone, each token as a full forward pass chooses it."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_vlm
import torch

from data_pipelines.manifest import media_shape
from data_pipelines.media.rules import lay_out
from data_pipelines.schema import media_items
from data_pipelines.template import encode_record
from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.inference.generate import generate, most_likely
from nemovl_train.inference.prompt import Prompt, build_prompt, pack_prompts
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout

CPU = torch.device("cpu")


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


def last_logits(model: NemotronVL, prompts: list[Prompt]) -> torch.Tensor:
    pack, last = pack_prompts(prompts, pad=0)
    with torch.no_grad():
        return model.logits(PackBatch.from_pack(pack, model.layout), last)


def step_by_step(model: NemotronVL, prompt: Prompt, count: int) -> list[int]:
    """The definition: every token is the most likely one of a full forward pass over all positions."""
    out: list[int] = []
    for _ in range(count):
        pack, last = pack_prompts([prompt], pad=0)
        with torch.no_grad():
            logits = model.logits(PackBatch.from_pack(pack, model.layout))[int(last[0])]
        logits[small_vlm.CONFIG.tokens.image] = float("-inf")
        out.append(int(logits.argmax()))
        prompt = prompt.extended(out[-1])
    return out


def test_prompts_in_one_pack_are_as_alone(model, prompts):
    together = last_logits(model, prompts)
    alone = torch.cat([last_logits(model, [prompt]) for prompt in prompts])
    assert (together - alone).norm() <= 1e-6 * alone.norm()
    # Order and neighbours do not matter either.
    turned = last_logits(model, prompts[::-1]).flip(0)
    assert (turned - alone).norm() <= 1e-6 * alone.norm()


def test_images_reach_the_answer(model, prompts):
    prompt = prompts[1]
    other = replace(prompt, tiles=255 - prompt.tiles)
    difference = last_logits(model, [prompt]) - last_logits(model, [other])
    assert difference.abs().max() > 1e-2


def test_generation_is_the_argmax_of_a_full_forward_at_every_step(model, prompts):
    expected = [step_by_step(model, prompt, 8) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 1
    assert not any(small_vlm.CONFIG.tokens.eos in ids for ids in expected)
    assert generate(model, prompts, max_new_tokens=8) == expected
    assert generate(model, prompts[:1], max_new_tokens=3) == [expected[0][:3]]
    assert generate(model, []) == []


def test_the_end_of_turn_stops_one_prompt_and_not_the_others(model, prompts, monkeypatch):
    free = generate(model, prompts, max_new_tokens=8)
    # A token that some answers hold, behind their first, plays the end of turn.
    end = next(i for i in free[0][1:] if i != free[0][0] and not all(i in ids for ids in free))
    monkeypatch.setattr(model, "sizes", replace(model.sizes, tokens=replace(model.sizes.tokens, eos=end)))
    stopped = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    assert generate(model, prompts, max_new_tokens=8) == stopped
    assert 0 < len(stopped[0]) < max(map(len, stopped)) == 8


def test_an_image_token_is_never_chosen():
    tokens = small_vlm.CONFIG.tokens
    logits = torch.zeros(1, small_vlm.BASE + 16)
    logits[0, tokens.image], logits[0, 7] = 9.0, 1.0
    assert most_likely(logits, tokens).tolist() == [7]
    assert logits[0, tokens.image] == 9.0
    assert most_likely(logits[:, : tokens.image], tokens).tolist() == [7]


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
