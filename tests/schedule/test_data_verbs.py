"""`nemovl data plan` and `nemovl data bench` on a recipe file."""

import json

import pytest
from small_schedule import write_recipes
from tiny_runs import write_data

from nemovl_train import cli


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("verbs")
    write_recipes(root / "recipes", write_data(root / "data"), root / "parts")
    return f"recipe={root / 'recipes/first.yaml'}"


def test_plan_as_json_and_as_text(recipe, capsys):
    assert cli.main(["data", "plan", recipe, "--json", "trainer.steps=7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["global_batch"], found["ranks"], found["packs"]) == (7, 2, 2, 14)
    assert found["sources"][0]["name"] == "pictures"
    assert cli.main(["data", "plan", recipe, "--ranks", "1", "data.packing=balanced"]) == 0
    text = capsys.readouterr().out
    assert "packing balanced" in text
    assert "1 ranks: the slowest has 1.000" in text


def test_bench_as_json(recipe, capsys):
    assert cli.main(["data", "bench", recipe, "--packs", "3", "--json", "parallel.tp=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks_per_pack"] == 2
    assert found["workers_per_node"] % found["workers_per_rank"] == 0
    assert found["loader"] is None
    assert found["worker"]["packs_per_second"] > 0


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--ranks", "3"], "--ranks 3: a step has 2 packs, so 1 to 2 ranks can share it"),
        (["--windows", "0"], "--windows 0 must be above 0"),
        (["data.sources.pictures.path=nowhere"], "no dataset at nowhere"),
        (["data.packing=bfs"], "did you mean bfd"),
    ],
)
def test_bad_usage_says_what_to_type(recipe, capsys, argv, reason):
    assert cli.main(["data", "plan", recipe, *argv]) == 2
    assert reason in capsys.readouterr().err


def test_no_recipe_is_an_error(capsys):
    assert cli.main(["data", "bench"]) == 2
    assert "recipe=NAME is missing" in capsys.readouterr().err
