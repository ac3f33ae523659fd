"""docs/config_reference.md is what the schemas say now, and says something about each option."""

import os
from pathlib import Path

from launch.site import SlurmConfig, load_site
from nemovl_train.config.build import option_types
from nemovl_train.config.reference import attribute_docs, reference
from nemovl_train.config.schema import EvalConfig, RunConfig, ScheduleConfig

PAGE = Path(__file__).parents[2] / "docs" / "config_reference.md"
ROOTS = {
    "A run (`nemovl train`)": (RunConfig, ""),
    "A schedule (`nemovl schedule`)": (ScheduleConfig, ""),
    "A SLURM site (`nemovl launch slurm`)": (SlurmConfig, "slurm."),
}


def test_the_page_is_current():
    made = reference(ROOTS)
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(made, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == made, "refresh it with UPDATE_GOLDEN=1"
    assert made.isascii()


def test_every_option_is_on_it():
    text = PAGE.read_text(encoding="utf-8")
    repeated = ("run.", "model.", "cluster.")  # a schedule's, which are a run's as well
    for cls, prefix in ROOTS.values():
        for key in option_types(cls):
            if cls is ScheduleConfig and key.startswith(repeated):
                continue
            assert f"| `{prefix}{key}` |" in text, key


def test_docstrings_are_read_whole():
    docs = attribute_docs(EvalConfig)
    assert docs["sources"] == "Dataset folders by name; split `split` of each is read once."
    assert docs["seq_length"].endswith("left out and counted.")
    assert attribute_docs(object) == {}


def test_what_the_page_says_of_a_site_is_accepted():
    defaults = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `slurm."):
            key, _, default = (cell.strip().strip("`") for cell in line.strip("|").split(" | ")[:3])
            if default != "empty" and not key.startswith("slurm.components."):
                defaults[key] = default
    assert len(defaults) > 10
    load_site(None, [f"{key}={value}" for key, value in defaults.items()])
