"""A VLM from a text model and a tower."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_import import EMBEDDING, HEAD, grow_rows, join_parts
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors

TEXT = replace(CONFIG, parts=("language",), language=replace(CONFIG.language, vocab_size=96))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "language"
    return export_canonical(
        random_tensors(TEXT, "language").items(), TEXT, out, kind="language", tokenizer=None, card={}
    )


def test_new_rows_are_the_mean_of_the_old(text_model: Path, folders: dict[str, Path]) -> None:
    joined = dict(join_parts(text_model, folders["vision"], config=CONFIG))
    assert joined.keys() == {n for n in random_tensors() if not n.startswith("projector.")}
    old = random_tensors(TEXT, "language")
    for name in (EMBEDDING, HEAD):
        assert joined[name].shape == (112, 32)
        assert torch.equal(joined[name][:96], old[name])
        assert torch.equal(joined[name][96:], old[name].double().mean(0).float().expand(16, -1))
    rest = {n: t for n, t in (old | random_tensors(kind="vision")).items() if n not in (EMBEDDING, HEAD)}
    assert all(torch.equal(joined[n], t) for n, t in rest.items())


def test_growing_is_exact_in_bf16_and_over_blocks() -> None:
    weight = torch.randn(9001, 4).bfloat16()
    grown = grow_rows(weight, 9002)
    assert grown.dtype == torch.bfloat16
    assert torch.equal(grown[-1], weight.double().mean(0).bfloat16())
    assert grow_rows(weight, 9001) is weight


def test_parts_must_fit(text_model: Path, folders: dict[str, Path]) -> None:
    other = replace(CONFIG, vision=replace(CONFIG.vision, prefix_tokens=16))
    with pytest.raises(ConversionError, match=r"vision\.prefix_tokens: the folder has 8, the model 16"):
        join_parts(text_model, folders["vision"], config=other)
    with pytest.raises(ConversionError, match="holds a vision model; a language model is expected"):
        join_parts(folders["vision"], text_model, config=CONFIG)
    wider = replace(CONFIG, language=replace(CONFIG.language, base_vocab_size=100))
    with pytest.raises(ConversionError, match=r"language\.base_vocab_size"):
        join_parts(text_model, folders["vision"], config=wider)
