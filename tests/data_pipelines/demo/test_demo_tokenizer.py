"""Ids, round trips and loading of the demo tokenizer."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_pipelines.demo.keyed import TRAIN
from data_pipelines.demo.stdlib_text import functions
from data_pipelines.demo.tokenizer import BASE_VOCAB, MEDIA_TAGS, SPECIALS, base_tokenizer, load, train_demo_tokenizer
from data_pipelines.exceptions import DataError
from data_pipelines.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return load(demo / "tokenizer")


def test_ids_are_those_of_the_released_model_at_a_smaller_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size(with_added_tokens=False) == BASE_VOCAB
    assert [tokenizer.token_to_id(name) for name in SPECIALS] == list(range(13))
    assert [tokenizer.token_to_id(name) for name in ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")] == [10, 11, 12]
    assert [tokenizer.token_to_id(name) for name in MEDIA_TAGS] == [BASE_VOCAB + i for i in range(10)]
    assert (MEDIA_TAGS[0], MEDIA_TAGS[9]) == ("<image>", "<video>")


def test_any_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    odd = "tab\there  two  \n\n\n end \u00e9\u4e2d\U0001f600 0042 <think></think>x = {'a': 1}\n"
    for content in (odd, functions(TRAIN)[0].source):
        assert tokenizer.decode(tokenizer.encode(content).ids, skip_special_tokens=False) == content


def test_digits_are_single_tokens_everywhere(tokenizer: Tokenizer) -> None:
    nine = tokenizer.token_to_id("9")
    assert nine is not None
    assert tokenizer.encode("9").ids == [nine]
    assert tokenizer.encode("the code is 999.").ids.count(nine) == 3
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token[1:])
                and "SPECIAL" not in token]  # fmt: skip


def test_reasoning_marks_do_not_depend_on_what_follows(tokenizer: Tokenizer) -> None:
    prefix = tokenizer.encode("<think></think>").ids
    assert len(prefix) == 1
    for answer in ("7", "(a)", "yes", ">x"):
        assert tokenizer.encode("<think></think>" + answer).ids == prefix + tokenizer.encode(answer).ids


@pytest.mark.parametrize("media", [True, False])
def test_transformers_loads_both_folders(demo: Path, tmp_path: Path, media: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = demo / "tokenizer"
    if not media:
        base_tokenizer(folder, tmp_path / "base")
        folder = tmp_path / "base"
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 12)
    assert len(loaded) == BASE_VOCAB + 10 * media
    ids = loaded("<s><SPECIAL_10>System\n\n<SPECIAL_11>User\nHi 7", add_special_tokens=False).input_ids
    assert ids[:2] == [1, 10]
    assert 11 in ids
    assert max(ids) < BASE_VOCAB
    image = loaded("<image>", add_special_tokens=False).input_ids
    assert (image == [BASE_VOCAB]) == media


def test_text_of_the_base_tokenizer_has_the_same_ids(demo: Path, tmp_path: Path) -> None:
    base_tokenizer(demo / "tokenizer", tmp_path)
    content = functions(TRAIN)[1].source
    assert load(tmp_path).encode(content).ids == load(demo / "tokenizer").encode(content).ids
    assert "<image>" not in json.loads((tmp_path / "tokenizer_config.json").read_text())["additional_special_tokens"]


def test_media_tags_in_user_text_stay_text(demo: Path) -> None:
    assert max(TextTokenizer(demo / "tokenizer").encode_text("an <image> and a <video>")) < BASE_VOCAB


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.demo.tokenizer.corpus", lambda: iter(["a few words"]))
    with pytest.raises(DataError, match="the nearest that the demo's texts can give is 277"):
        train_demo_tokenizer(tmp_path / "tokenizer")


def test_a_missing_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make-demo"):
        base_tokenizer(tmp_path / "none", tmp_path / "out")
