import json

import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.tokenizer import TextTokenizer


def test_special_strings_in_text_stay_text(tokenizer):
    text = "<s><image></img><SPECIAL_12><unk>"
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert min(ids) >= 16
    assert tokenizer.special("<image>") not in ids
    assert [tokenizer.special(n) for n in ("<unk>", "<s>", "<SPECIAL_10>", "<SPECIAL_12>")] == [0, 1, 10, 12]
    assert tokenizer.pad_id == 0


def test_digest_ignores_layout_of_the_file_and_sees_its_content(tokenizer, tokenizer_folder, tmp_path):
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec, indent=3))
    assert TextTokenizer(tmp_path).digest() == tokenizer.digest()
    spec["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert TextTokenizer(tmp_path).digest() != tokenizer.digest()


def test_missing_broken_or_incomplete_files_are_refused(tokenizer_folder, tmp_path):
    with pytest.raises(DataError, match=r"set data.tokenizer"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        TextTokenizer(tmp_path)
    text = (tokenizer_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<img>", "<pic>"))
    with pytest.raises(DataError, match="lacks the special tokens <img>"):
        TextTokenizer(tmp_path)
    # A text-only model's tokenizer has no tags; its ids for words are the same.
    text_only = TextTokenizer(tmp_path, media=False)
    assert text_only.encode_text("what <img>?") == TextTokenizer(tokenizer_folder).encode_text("what <img>?")
