"""The pages on clusters and errors say what the program says, and the container file installs what is pinned."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from launch.site import SlurmConfig, site_problems
from nemovl_train.config.build import build, option_types

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("cluster.md", "troubleshooting.md", "out_of_memory.md")]
OTHERS = {"CUDA out of memory"}
"""Texts of other programs."""


def said() -> str:
    """Everything that the program can say: string literals of all modules, pieces of one message joined."""
    text = ""
    for package in ("nemovl_train", "data_pipelines", "launch"):
        for pattern in ("*.py", "*.jinja"):
            text += "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / package).rglob(pattern)))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def quoted_errors() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row)]


def test_every_error_text_is_one_that_the_program_has():
    texts = quoted_errors()
    program = said()
    assert len(texts) > 25
    assert [text for text in texts if text not in program and text not in OTHERS] == []
    assert "the carburettor is flooded" not in program  # the search does not find just anything


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_options_of_a_site_exist(path):
    known = option_types(SlurmConfig)
    for key in re.findall(r"`slurm\.([a-z_.]+)", path.read_text()):
        assert key == "key" or key in known or any(name.startswith(f"{key}.") for name in known), key


def test_the_site_file_of_the_guide_is_accepted():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    problems: list[str] = []
    site = build(SlurmConfig, {**yaml.safe_load(block), "time": "4:00:00"}, problems)
    assert problems == site_problems(site) == []
    assert site.partition == ("batch", "spare")


def test_the_container_takes_its_versions_from_the_project():
    text = (ROOT / "launch/Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [re.match(r"[\w-]+", pin).group() for pin in project["dependencies"]]
    assert 'project["dependencies"]' in text
    assert 'project["optional-dependencies"]["gpu"]' in text
    assert not [name for name in packages if re.search(rf"\b{name}\s*[=~<>]=", text)]
    assert "python3.12" in text
