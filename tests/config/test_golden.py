"""Every composed recipe, and the list of options, as files: a changed default shows up in review.

Refresh them with UPDATE_GOLDEN=1 after looking at the difference.
"""

import os
import re
from pathlib import Path

import pytest

from nemovl_train.config.build import option_types
from nemovl_train.config.compose import compose_run, compose_schedule
from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.recipes import list_recipes, recipe_kind
from nemovl_train.config.schema import RunConfig, ScheduleConfig

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("cls", [RunConfig, ScheduleConfig], ids=lambda cls: cls.__name__)
def test_every_option_is_read_somewhere(cls: type):
    """By its name alone, so a name that two sections share passes if either is read."""
    declared = {"nemovl_train/config/schema.py", "nemovl_train/config/validate.py", "data_pipelines/config.py"}
    files = [path for top in ("nemovl_train", "data_pipelines") for path in (ROOT / top).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path.relative_to(ROOT).as_posix() not in declared)
    read = set(re.findall(r"\.([a-z_0-9]+)", code))
    assert {key for key in option_types(cls) if key.rpartition(".")[2] not in read} == set()


def test_public_options_are_frozen():
    """Adding an option is a decision: it has to be read by something, documented and kept."""
    lines = [f"{kind} {key}: {name}" for kind, cls in (("run", RunConfig), ("schedule", ScheduleConfig))
             for key, name in option_types(cls).items()]  # fmt: skip
    check(GOLDEN / "options.txt", "\n".join(lines) + "\n")
