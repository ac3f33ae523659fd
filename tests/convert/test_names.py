"""The table against the published layout: names, counts and sizes of the released model."""

import math
from dataclasses import replace

import pytest

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.names import kind_of, table
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG


def released(vocab_size: int = 131072) -> ModelConfig:
    config = ModelConfig()
    return replace(config, language=replace(config.language, vocab_size=vocab_size))


def test_counts_of_the_released_model() -> None:
    entries = table(released(), "vlm")
    names = [n for e in entries for n in e.hf]
    sizes = {n: math.prod(s) for e in entries for n, s in zip(e.hf, e.hf_shapes, strict=True)}
    parts = ("language_model.", "vision_model.", "mlp1.")
    assert [sum(n.startswith(p) for n in names) for p in parts] == [369, 387, 3]
    # Public totals of Nemotron-Nano-12B-v2 (131,072 rows), RADIO-H with 16 prefix tokens, and the projector.
    totals = [sum(v for n, v in sizes.items() if n.startswith(p)) for p in parts]
    assert totals == [12_310_001_152, 651_653_120, 209_720_320]
    assert all(math.prod(e.shape) == sum(math.prod(s) for s in e.hf_shapes) for e in entries)


def test_names_of_the_released_layout() -> None:
    shapes = {n: s for e in table(released(), "vlm") for n, s in zip(e.hf, e.hf_shapes, strict=True)}
    expected = {
        "language_model.backbone.embeddings.weight": (131072, 5120),
        "language_model.backbone.layers.0.mixer.in_proj.weight": (22656, 5120),
        "language_model.backbone.layers.0.mixer.conv1d.weight": (12288, 1, 4),
        "language_model.backbone.layers.0.mixer.norm.weight": (10240,),
        "language_model.backbone.layers.1.mixer.up_proj.weight": (20480, 5120),
        "language_model.backbone.layers.7.mixer.k_proj.weight": (1024, 5120),
        "language_model.backbone.layers.7.mixer.o_proj.weight": (5120, 5120),
        "language_model.backbone.layers.61.norm.weight": (5120,),
        "language_model.backbone.norm_f.weight": (5120,),
        "language_model.lm_head.weight": (131072, 5120),
        "vision_model.radio_model.model.patch_generator.cls_token.token": (16, 1280),
        "vision_model.radio_model.model.patch_generator.pos_embed": (1, 16384, 1280),
        "vision_model.radio_model.model.patch_generator.embedder.weight": (1280, 768),
        "vision_model.radio_model.model.blocks.31.attn.qkv.bias": (3840,),
        "mlp1.0.weight": (5120,),
        "mlp1.1.weight": (20480, 5120),
        "mlp1.3.weight": (5120, 20480),
    }
    assert {n: shapes[n] for n in expected} == expected


@pytest.mark.parametrize(("kind", "first"), [("language", "backbone.embeddings.weight"), ("vision", "radio_model.")])
def test_parts_have_no_outer_prefix(kind: str, first: str) -> None:
    entries = table(CONFIG, kind)
    assert entries[0].hf[0].startswith(first)
    assert {e.ours for e in entries} < {e.ours for e in table(CONFIG, "vlm")}


def test_kind_follows_from_the_parts() -> None:
    assert kind_of(CONFIG) == "vlm"
    assert kind_of(replace(CONFIG, parts=("language",))) == "language"
    with pytest.raises(ConversionError, match="projector"):
        kind_of(replace(CONFIG, parts=("projector",)))


def test_a_llama_shaped_model_has_no_layout() -> None:
    other = replace(CONFIG, language=replace(CONFIG.language, activation="swiglu", position="rope"))
    with pytest.raises(ConversionError, match="swiglu"):
        table(other, "vlm")
