"""Commands and names in the documents exist."""

import re
import shlex
from pathlib import Path

import pytest

from nemovl_train import cli
from nemovl_train.config.app import run_app
from nemovl_train.config.recipes import list_recipes

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
MADE_BY_RUNS = ("runs/", "my_stage.yaml", ".venv/")


def blocks(text: str) -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for path in DOCUMENTS:
        for line in blocks(path.read_text()):
            words = shlex.split(line, comments=True)
            if words:
                found.append((path.name, words))
    return found


def parse(words: list[str], folder: Path) -> None:
    """Runs what is quick and harmless, parses the rest."""
    if words[0] == "train":
        run_app("run", words[1:], lambda config: 0)
    elif words[0] == "schedule":
        run_app("schedule", words[1:], lambda config: 0)
    elif words[0] == "recipes" or "--dry-run" in words:
        assert cli.main(words) == 0
    else:
        cli.build_parser(words[0]).parse_args(words)


def test_nemovl_commands_are_understood(tmp_path, monkeypatch, capsys):
    # In the order of the document: one command copies the recipe that a later one runs.
    monkeypatch.chdir(tmp_path)
    seen = [words[1:] for _, words in commands() if words[0].endswith("nemovl")]
    assert len(seen) >= 5
    for words in seen:
        parse(words, tmp_path)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set()
    for path in DOCUMENTS:
        mentioned |= set(
            re.findall(r"\bmake (demo|check|help|test-all|test|[a-z-]+)(?=`|\s+#|$)", path.read_text(), re.M)
        )
    assert {"demo", "test"} <= mentioned <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_recipes_exist(path: Path):
    for name in re.findall(r"`([\w./-]+)`", path.read_text()):
        if name.startswith(MADE_BY_RUNS):
            continue
        if name.startswith("tiny/"):
            assert name in list_recipes(), name
        elif "/" in name or name.endswith((".md", ".py", ".yaml", ".toml")):
            assert (ROOT / name).exists(), name


def test_every_stage_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in list_recipes() if name.startswith("tiny/stage"))
