"""Recipes compose, and everything that is wrong is said at once with the nearest right thing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemovl_train.config.compose import compose_run, compose_schedule, compose_stage
from nemovl_train.config.recipes import copy_recipe, list_recipes, recipe_kind
from nemovl_train.exceptions import ConfigError, UserError

STAGE = "tiny/stage1_sft_16k"


def problems(recipe: str, *overrides: str, **kwargs) -> list[str]:
    compose = compose_schedule if "schedule" in recipe else compose_run
    with pytest.raises(ConfigError) as caught:
        compose(recipe, overrides, **kwargs)
    return caught.value.problems


def test_overrides_reach_the_config():
    config = compose_run(STAGE, ["optim.lr=3e-4", "trainer.steps=7", "data.sources.digits_read.max_samples=5"])
    assert (config.optim.lr, config.trainer.steps) == (3e-4, 7)
    assert config.data.sources["digits_read"].max_samples == 5
    assert config.data.sources["digits_read"].path == "runs/tiny/data/digits_read"
    for plus in ("", "+", "++"):
        assert compose_run(STAGE, [f"{plus}data.sources.new.path=x"]).data.sources["new"].path == "x"
    assert config.trainer.train == ("vision", "projector", "language")


def test_values_need_no_quoting_and_feed_interpolations():
    config = compose_run(STAGE, values={"run.root": "/a b/c=d,[e]", "trainer.init_from": "/x y/'z'"})
    assert config.data.tokenizer == "/a b/c=d,[e]/tiny/data/tokenizer"
    assert config.trainer.init_from == "/x y/'z'"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=3", "optim.lrr is not an option; did you mean optim.lr?"),
        ("optm.lr=3", "optm.lr is not an option; did you mean optim.lr?"),
        ("+lr=3", "lr is not an option; did you mean optim.lr?"),
        ("optm=adamw", "optm is not an option; did you mean optim?"),
        ("+typo=1", "typo is not an option; `--cfg job` shows all of them"),
        ("data.sources.code.pth=x", "data.sources.code.pth is not an option; did you mean data.sources.code.path?"),
        ("+optim.typo=1", "optim.typo is not an option; optim has beta1,"),
        ("optim.lr=fast", "optim.lr='fast': this is a number"),
        ("trainer.steps=1.5", "trainer.steps=1.5: this is a whole number"),
        ("trainer.train=vision", "trainer.train='vision': this is a list; write [vision]"),
        ("run=3", "run=3: this is a section"),
        ("+data.sources.new.weight=1", "data.sources.new.path is missing; add +data.sources.new.path=VALUE"),
        ("model=tinny", "model=tinny is not an option of this group; did you mean tiny?"),
        ("optim.lr=1,2", "optim.lr=1,2: several values for one run; add -m"),
        ("nonsense", "nonsense: not understood; write key=value"),
        ("data.tokenizer=${nope}", "data.tokenizer refers to something that is not there"),
    ],
)
def test_a_wrong_override_is_explained(override: str, sentence: str):
    found = problems(STAGE, override)
    assert any(problem.startswith(sentence) for problem in found), found


def test_all_problems_are_reported_together():
    found = problems(
        STAGE, "optm.lr=1", "trainer.steps=0", "data.seq_length=250", "parallel.tp=3", "data.packing=bdf", "x y"
    )
    assert len(found) == 6
    assert any("nearest: 224 or 256" in problem for problem in found)


def test_a_wrong_recipe_name_or_kind_is_explained():
    assert "did you mean tiny/stage1_sft_16k?" in problems("tiny/stage1_sft")[0]
    with pytest.raises(ConfigError, match="type: nemovl schedule recipe=tiny/schedule"):
        compose_run("tiny/schedule")
    with pytest.raises(ConfigError, match="type: nemovl train"):
        compose_schedule(STAGE)
    with pytest.raises(ConfigError, match="not among"):
        compose_run("../configs/model/tiny")


def test_a_schedule_checks_its_stages_before_anything_runs():
    stages = "stages=[{recipe:tiny/stage1_sft_16k,overrides:['trainer.steps=0']},{recipe:tiny/nope}]"
    found = problems("tiny/schedule", stages)
    assert found[0] == "stages.0 (tiny/stage1_sft_16k): trainer.steps=0: at least 1"
    assert "did you mean" in found[1]
    assert len(found) == 2
    twice = problems("tiny/schedule", "stages=[{recipe:tiny/stage1_sft_16k},{recipe:tiny/stage1_sft_16k}]")
    assert "share this folder" in twice[0]
    assert "other model" in problems("tiny/schedule", "model.projector.ffn_hidden_size=64")[0]


def test_a_stage_lives_in_the_folder_of_its_schedule():
    schedule = compose_schedule("tiny/schedule", ["run.name=other", "run.root=elsewhere"])
    stage = compose_stage(schedule, schedule.stages[1], values={"trainer.init_from": "parent"})
    assert (stage.run.root, stage.run.name, stage.run.stage) == ("elsewhere", "other", "stage1_sft_16k")
    assert stage.data.sources["text"].path == "elsewhere/other/data/text"
    assert stage.trainer.init_from == "parent"


def test_a_copied_recipe_runs_from_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = copy_recipe(STAGE, tmp_path / "mine" / "it's.yaml")
    target.write_text(target.read_text().replace("steps: ", "steps: 1"))
    assert recipe_kind("mine/it's.yaml") == "run"
    assert compose_run("mine/it's.yaml").trainer.steps > compose_run(STAGE).trainer.steps
    target.write_text(target.read_text() + "\noptm:\n  lr: 1\nlogging:\n  evry_steps: 2\n")
    found = problems("mine/it's.yaml")
    assert [p.split(";")[1] for p in found] == [" did you mean optim.lr?", " did you mean logging.every_steps?"]
    with pytest.raises(UserError, match="exists"):
        copy_recipe(STAGE, target)


def test_groups_may_have_folders():
    found = problems("nano_12b_v2_vl/stage1_sft_16k", "data=nano_v2_vl/stage9")
    assert found == ["data=nano_v2_vl/stage9 is not an option of this group; did you mean nano_v2_vl/stage4?"]
    found = problems("nano_12b_v2_vl/stage1_sft_16k", "cluster=h100_x32")
    assert "cluster=h100_x32 is not an option of this group; did you mean h100_x" in found[0]
    config = compose_run("nano_12b_v2_vl/stage1_sft_16k", ["data=nano_v2_vl/stage3"])
    assert (list(config.data.sources), config.data.seq_length) == (["code_reasoning"], 49152)


def test_groups_of_ones_own_are_found(tmp_path):
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "two.yaml").write_text("tp: 2\n")
    assert compose_run(STAGE, ["parallel=two"], config_dirs=[tmp_path]).parallel.tp == 2
    assert "did you mean two?" in problems(STAGE, "parallel=tw", config_dirs=[tmp_path])[0]


def test_every_recipe_has_a_launch_line_and_a_description():
    from nemovl_train.config.recipes import describe, recipe_path

    for name in list_recipes():
        text = recipe_path(name).read_text()
        verb = "schedule" if recipe_kind(name) == "schedule" else "train"
        on_one = f"#   nemovl {verb} recipe={name}\n"
        on_many = f"#     -m nemovl_train.train recipe={name}\n"
        on_a_node = f"-m nemovl_train.train recipe={name} "
        many = "#   torchrun --nnodes " in text and on_many in text
        assert on_one in text or many or ("#   torchrun --nproc-per-node " in text and on_a_node in text)
        assert describe(name)


def test_composing_imports_neither_torch_nor_megatron():
    code = (
        "import sys\n"
        "from nemovl_train.config.compose import compose_schedule, compose_run\n"
        "compose_schedule('tiny/schedule')\n"
        "print([m for m in ('torch', 'megatron', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_profile_and_fp8_are_one_word_each():
    assert compose_run("tiny/stage1_sft_16k").profile.steps == 0
    assert compose_run("tiny/stage1_sft_16k", ["profile=on"]).profile.steps == 2
    stage = "nano_12b_v2_vl/stage1_sft_16k"
    assert compose_run(stage, ["precision=fp8"]).precision == replace(compose_run(stage).precision, fp8="blockwise")
