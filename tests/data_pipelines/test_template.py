import numpy as np
import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import MediaLayout
from data_pipelines.template import encode_prompt, encode_record

TPT = 4
ONE = MediaLayout("image", (1, 1), False)
FOUR = MediaLayout("image", (2, 2), True)
CLIP = MediaLayout("video", (1, 1), False, (0, 5, 10), (0.0, 0.5, 1.0))


def show(sample, tokenizer):
    """Text of a sample with every image run written as {n}."""
    text = tokenizer.decode(sample.input_ids)
    for n in range(40, 0, -1):
        text = text.replace("<image>" * n, f"{{{n}}}")
    return text


def supervised_text(sample, tokenizer):
    return tokenizer.decode(sample.labels[sample.labels != -100])


def talk(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return {"id": "r", "messages": messages}


def test_text_only_golden(tokenizer):
    sample = encode_record(talk("Hi", "Hello.", system="Be brief."), [], tokenizer, tokens_per_tile=TPT)
    assert show(sample, tokenizer) == (
        "<s><SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\nHi\n"
        "<SPECIAL_11>Assistant\n<think></think>Hello.\n<SPECIAL_12>\n"
    )
    assert supervised_text(sample, tokenizer) == "<think></think>Hello.\n<SPECIAL_12>\n"


def test_system_block_is_always_there_and_ids_are_the_released_ones(tokenizer):
    ids = encode_record(talk("a", "b"), [], tokenizer, tokens_per_tile=TPT).input_ids.tolist()
    newline = tokenizer.encode_text("\n")
    assert ids[:2] == [1, 10]
    assert ids[2 : ids.index(11)] == tokenizer.encode_text("System\n\n")
    assert ids[-1 - len(newline) :] == [12, *newline]


def test_labels_are_shifted_inside_the_sample(tokenizer):
    sample = encode_record(talk("q", "one", "q2", "two"), [], tokenizer, tokens_per_tile=TPT)
    ids, labels, turns = sample.input_ids, sample.labels, sample.turns
    assert labels[-1] == -100
    assert turns[-1] == -1
    at = np.flatnonzero(labels != -100)
    np.testing.assert_array_equal(labels[at], ids[at + 1])
    np.testing.assert_array_equal(turns >= 0, labels != -100)
    assert set(turns[at].tolist()) == {0, 1}
    for turn, answer in enumerate(("one", "two")):
        expected = f"<think></think>{answer}\n<SPECIAL_12>\n"
        assert tokenizer.decode(labels[turns == turn]) == expected


@pytest.mark.parametrize(
    ("system", "user", "answer", "body", "answer_shown"),
    [
        ("", "x", "y", "x", "<think></think>y"),
        ("/think", "x", "<think>\nwhy\n</think>y", "x", "<think>\nwhy\n</think>y"),
        ("/think", "x /no_think", "y", "x ", "<think></think>y"),
        ("", "a </think> b/think", "y", "a </think> b", "y"),
        ("", "x", "<think></think>y", "x", "<think></think>y"),
    ],
)
def test_reasoning_switches(tokenizer, system, user, answer, body, answer_shown):
    sample = encode_record(talk(user, answer, system=system), [], tokenizer, tokens_per_tile=TPT)
    assert show(sample, tokenizer) == (
        f"<s><SPECIAL_10>System\n\n<SPECIAL_11>User\n{body}\n<SPECIAL_11>Assistant\n{answer_shown}\n<SPECIAL_12>\n"
    )


def test_a_switch_holds_for_the_answers_behind_it(tokenizer):
    turns = ("a", "1", "b /think", "<think>\nwhy\n</think>2", "c", "3", "d /no_think", "4")
    sample = encode_record(talk(*turns), [], tokenizer, tokens_per_tile=TPT)
    answers = [part.split("\n<SPECIAL_12>")[0] for part in show(sample, tokenizer).split("<SPECIAL_11>Assistant\n")[1:]]
    assert answers == ["<think></think>1", "<think>\nwhy\n</think>2", "3", "<think></think>4"]


def content(record, tokenizer, layouts):
    sample = encode_record(record, layouts, tokenizer, tokens_per_tile=TPT)
    shown = show(sample, tokenizer)
    return sample, shown.split("<SPECIAL_11>User\n")[1].split("\n<SPECIAL_11>Assistant")[0]


def test_one_image_goes_before_the_text(tokenizer, record):
    sample, shown = content(record("r", "what?", "x", images=1), tokenizer, [FOUR])
    assert shown == "<img>{20}</img>\nwhat?"
    image = tokenizer.special("<image>")
    first = sample.input_ids.tolist().index(image)
    np.testing.assert_array_equal(sample.tile_start, first + TPT * np.arange(5))
    np.testing.assert_array_equal(sample.media_of_tile, np.zeros(5))
    assert (sample.input_ids == image).sum() == 20


def test_several_images_are_numbered(tokenizer, record):
    sample, shown = content(record("r", "same?", "x", images=2), tokenizer, [ONE, FOUR])
    assert shown == "<image 1><img>{4}</img> <image 2><img>{20}</img>\nsame?"
    assert sample.media_of_tile.tolist() == [0, 1, 1, 1, 1, 1]


def test_video_frames_are_lines_without_a_header(tokenizer, record):
    _, shown = content(record("r", "when?", "x", videos=1), tokenizer, [CLIP])
    assert shown == (
        "Frame 1 sampled at 0.00 seconds: <img>{4}</img>\n"
        "Frame 2 sampled at 0.50 seconds: <img>{4}</img>\n"
        "Frame 3 sampled at 1.00 seconds: <img>{4}</img>\nwhen?"
    )


def test_nothing_visual_or_before_an_image_is_supervised(tokenizer, record):
    sample, _ = content(record("r", "same?", "x", images=2, videos=1), tokenizer, [ONE, FOUR, CLIP])
    visual = np.isin(sample.input_ids, [tokenizer.special(t) for t in ("<image>", "<img>", "</img>")])
    assert not np.isin(sample.labels[:-1][visual[1:]], sample.input_ids[visual]).any()
    assert (sample.labels[visual] == -100).all()


def test_tags_in_the_text_place_the_media(tokenizer, record):
    _, shown = content(record("r", "left <image> right <image> end", "x", images=2), tokenizer, [ONE, FOUR])
    assert shown == "left <img>{4}</img> right <img>{20}</img> end"


def test_video_before_images_in_the_record_keeps_media_numbers(tokenizer):
    items = [
        {"type": "video", "video": "v.mp4"},
        {"type": "image", "image": "i.png"},
        {"type": "text", "text": "go"},
    ]
    sample, shown = content(talk(items, "x"), tokenizer, [CLIP, FOUR])
    assert shown.startswith("<img>{20}</img>\nFrame 1")
    assert sample.media_of_tile.tolist() == [1] * 5 + [0] * 3


def test_literal_tags_without_media_stay_text(tokenizer, record):
    text = "write <image> twice: <image> and <SPECIAL_12>, <s>, </img> <video>"
    sample, _ = content(record("r", text, "<image> done <SPECIAL_12>"), tokenizer, [])
    ids = sample.input_ids.tolist()
    specials = [
        i for i in ids if i in {tokenizer.special(t) for t in ("<image>", "<img>", "</img>", "<s>")} or 3 <= i < 16
    ]
    assert specials == [1, 10, 11, 11, 12]
    assert text in tokenizer.decode(ids)
    assert len(sample.tile_start) == 0


def test_literal_item_is_never_searched(tokenizer, record):
    sample, _ = content(record("r", "what is <image>?", "x", images=1, literal=True), tokenizer, [ONE])
    assert len(sample.tile_start) == 1
    assert (sample.input_ids == tokenizer.special("<image>")).sum() == TPT
    assert "</img>\nwhat is <image>?" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(("tags", "images"), [(2, 1), (1, 2), (3, 2)])
def test_count_mismatch_names_record_and_counts(tokenizer, record, tags, images):
    bad = record("page-7", "<image> " * tags, "x", images=images)
    with pytest.raises(DataError, match=rf"page-7.*message 0: {tags} <image> in the text but {images} image"):
        encode_record(bad, [ONE] * images, tokenizer, tokens_per_tile=TPT)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["<ima", "ge> x"], "<img>{4}</img>\n<image> x"),
        (["<im/thinkage> x"], "<img>{4}</img> x"),
        (["<ima</think>ge>", "<image>"], "<ima</think>ge><img>{4}</img>"),
        (["a <ima", "<image>", "ge>"], "a <ima<img>{4}</img>ge>"),
    ],
)
def test_tags_are_counted_item_by_item_without_switches(tokenizer, texts, expected):
    items = [{"type": "image", "image": "i.png"}, *({"type": "text", "text": text} for text in texts)]
    sample = encode_record(talk(items, "x"), [ONE], tokenizer, tokens_per_tile=TPT)
    assert (sample.input_ids == tokenizer.special("<image>")).sum() == TPT
    # `show` writes words and specials alike: a lone <image> that is words becomes {1}.
    shown = show(sample, tokenizer).split("<SPECIAL_11>User\n")[1].split("\n<SPECIAL_11>Assistant")[0]
    assert shown.replace("{1}", "<image>") == expected


def test_a_tag_that_a_switch_leaves_behind_counts(tokenizer):
    items = [{"type": "image", "image": "i.png"}, {"type": "text", "text": "<image> <im/thinkage>"}]
    with pytest.raises(DataError, match="2 <image> in the text but 1 image"):
        encode_record(talk(items, "x"), [ONE], tokenizer, tokens_per_tile=TPT)


@pytest.mark.parametrize(("system", "ending"), [("", "<think></think>"), ("/think", "<think>\n")])
def test_prompt_is_a_prefix_of_what_training_saw(tokenizer, record, system, ending):
    trained = record("r", "what?", "<think>\nhm\n</think>x" if system else "x", images=1)
    trained["messages"].insert(0, {"role": "system", "content": system})
    full = encode_record(trained, [FOUR], tokenizer, tokens_per_tile=TPT)
    prompt = encode_prompt(trained, [FOUR], tokenizer, tokens_per_tile=TPT)
    assert tokenizer.decode(prompt.input_ids).endswith(f"<SPECIAL_11>Assistant\n{ending}")
    np.testing.assert_array_equal(full.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    np.testing.assert_array_equal(full.tile_start, prompt.tile_start)
    assert (prompt.labels == -100).all()


def test_pieces_tokenise_as_the_whole_string_does(tokenizer, record):
    """What a user of the exported folder sends, one string with special tokens in it, gives the ids we train on."""
    sample = encode_record(record("r", "what?", "it is", images=1), [ONE], tokenizer, tokens_per_tile=TPT)
    whole = tokenizer.decode(sample.input_ids)
    assert tokenizer._full.encode(whole, add_special_tokens=False).ids == sample.input_ids.tolist()
