"""Every composed recipe, and the list of options, as files: a changed default shows up in review.

Refresh them with UPDATE_GOLDEN=1 after looking at the difference.
"""

import os
from pathlib import Path

import pytest

from nemovl_train.config.build import option_types
from nemovl_train.config.compose import compose_run, compose_schedule
from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.recipes import list_recipes, recipe_kind
from nemovl_train.config.schema import RunConfig, ScheduleConfig

GOLDEN = Path(__file__).parent / "golden"


def check(path: Path, text: str) -> None:
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.is_file(), f"{path} is missing; make it with UPDATE_GOLDEN=1"
    assert text == path.read_text(), "differs from the stored file; if that is meant, refresh with UPDATE_GOLDEN=1"


def file_of(recipe: str) -> Path:
    return GOLDEN / f"{recipe.replace('/', '__')}.yaml"


@pytest.mark.parametrize("recipe", list_recipes())
def test_composed_recipe(recipe: str):
    config = compose_schedule(recipe) if recipe_kind(recipe) == "schedule" else compose_run(recipe)
    check(file_of(recipe), dump_yaml(config))


def test_no_golden_file_is_left_over():
    assert {path.name for path in GOLDEN.glob("*.yaml")} == {file_of(recipe).name for recipe in list_recipes()}


def test_public_options_are_frozen():
    """Adding an option is a decision: it has to be read by something, documented and kept."""
    lines = [f"{kind} {key}: {name}" for kind, cls in (("run", RunConfig), ("schedule", ScheduleConfig))
             for key, name in option_types(cls).items()]  # fmt: skip
    check(GOLDEN / "options.txt", "\n".join(lines) + "\n")
