"""Adapter options: what patterns match, and what is said about those that match nothing."""

from dataclasses import replace

import pytest

from nemovl_train.config.adapters import adapted_linears, linears
from nemovl_train.config.compose import compose_run
from nemovl_train.config.schema import AdapterConfig, AdapterTargets, ModelConfig
from nemovl_train.exceptions import ConfigError

LORA = "finetune/lora"


def names(**targets):
    model = ModelConfig()
    return [
        f"{x.part}.{x.name}" for x in adapted_linears(model, AdapterConfig(rank=4, targets=AdapterTargets(**targets)))
    ]


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_run(LORA, overrides)
    return caught.value.problems


def test_patterns_match_whole_names_and_ends():
    assert len(names(language=("in_proj",))) == 28
    assert names(language=("mixer.*",)) == names(language=("in_proj", "out_proj"))
    assert len(names(language=("*",))) == 2 * 62
    assert names(language=("decoder.layers.0.*",)) == [
        "language.decoder.layers.0.mixer.in_proj",
        "language.decoder.layers.0.mixer.out_proj",
    ]
    # layer 10 and later are not layers whose number is 1
    assert all(".layers.1." in name for name in names(vision=("layers.1.*",)))
    assert names(projector=("*",)) == ["projector.linear_fc1", "projector.linear_fc2"]
    assert names() == []


def test_no_rank_no_adapters():
    assert adapted_linears(ModelConfig(), AdapterConfig(targets=AdapterTargets(language=("*",)))) == []


def test_the_shipped_groups():
    language = compose_run(LORA)
    assert {x.part for x in adapted_linears(language.model, language.adapter)} == {"language"}
    with_vision = compose_run(LORA, ["adapter=lora_with_vision"])
    assert adapted_linears(with_vision.model, with_vision.adapter) == linears(with_vision.model)
    assert compose_run(LORA, ["adapter=none", "trainer.train=[language]"]).adapter.rank == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.targets.language=[in_porj]"], "in_porj matches no linear layer of language; did you mean in_proj"),
        (["adapter.targets.language=[linear_fc3]"], "did you mean linear_fc2 or linear_fc1"),
        (["adapter.targets.vision=[in_proj]"], "in_proj matches no linear layer of vision; it does in language"),
        (["adapter.targets.language=[output_layer]"], "its layers are in_proj, linear_fc1"),
        (["adapter.targets.language=[layers.99.*]"], "layers.99.* matches no linear layer"),
        (["trainer.train=[language]"], "language has adapters, so its own weights stay frozen"),
        (["adapter.rank=-1"], "adapter.rank=-1: at least 0"),
        (["adapter.alpha=0"], "adapter.alpha=0.0: must be above 0"),
        (["adapter.rank=0"], "adapter.rank=0 turns adapters off"),
        (["adapter.targets.language=[]"], "names no layer"),
        (["trainer.init_from=null"], "trainer.init_from is empty"),
        (["adapter=none"], "trainer.train=[]"),
        (["optim.lr_scale.vision=0"], "optim.lr_scale.vision=0.0: must be above 0"),
        (["adapter.target.language=[in_proj]"], "did you mean adapter.targets.language?"),
    ],
)
def test_what_does_not_go_is_named_with_what_does(overrides, said):
    assert any(said in problem for problem in problems(*overrides)), problems(*overrides)


def test_all_problems_come_at_once():
    found = problems("adapter.targets.language=[in_porj,mixxer.*]", "adapter.targets.vision=[foo]", "optim.lr=-1")
    assert len(found) == 4


def test_an_absent_part_is_named():
    from nemovl_train.config.validate import validate_run

    config = compose_run(LORA)
    text = replace(config, model=replace(config.model, parts=("language",)))
    text = replace(text, adapter=replace(text.adapter, targets=AdapterTargets(vision=("*",), language=("*",))))
    assert any("adapter.targets.vision: the model has no such part" in p for p in validate_run(text))
