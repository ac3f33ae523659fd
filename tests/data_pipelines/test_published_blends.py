"""Every dataset that a published stage names has its group, licence, availability and stand-in in `docs/blends.md`."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/data/nano_v2_vl"
STAGES = range(5)
LICENCE = re.compile(
    r"ask the owner|CC BY(-NC)?(-SA)?( \d\.\d)?|CC0 1\.0|ODC-BY 1\.0|CDLA-Permissive \d\.\d|Apache-2\.0|MIT|GPL-3\.0"
    r"|Ego4D licence, signed|its own, not for commercial use"
)
QUESTIONS = "As questions that a model wrote"
WORDS = {"Captions", "Actions", "Grounding in time", QUESTIONS}
"""What stands in the comments besides names. Behind `QUESTIONS` not the sets are meant but what was made of them."""


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    source: str
    stages: tuple[int, ...]
    licence: str
    public: str
    stand_in: str


def table() -> list[Entry]:
    rows = []
    for line in (ROOT / "docs/blends.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| Dataset"):
            continue
        name, source, stages, licence, public, stand_in = (cell.strip() for cell in line.strip("|").split("|"))
        numbers = tuple(int(stage) for stage in stages.split(", "))
        rows.append(Entry(name, source.strip("`"), numbers, licence, public, stand_in))
    return rows


def commented(stage: int) -> dict[str, str]:
    """The comment above each source of a stage, as one line."""
    found: dict[str, str] = {}
    comment: list[str] = []
    lines = (FOLDER / f"stage{stage}.yaml").read_text().split("\nsources:\n")[1].splitlines()
    for line in lines:
        if line.startswith("  # "):
            comment.append(line[4:])
        elif match := re.fullmatch(r"  (\w+):", line):
            found[match[1]] = " ".join(comment)
            comment = []
        elif not line.startswith("    "):
            comment = []
    return found


def named(comment: str) -> dict[str, str]:
    """Names in a comment with what their mark says of them; a mark before a colon holds for the names behind it."""
    found, general, made = {}, "", ""
    for chunk in re.split(r"[,;.:](?![^(]*\))(?:\s|$)", comment):
        name = re.sub(r"\([^)]*\)", "", chunk).strip()
        marks = re.findall(r"\(([^)]*)\)", chunk)
        mark = next((m for m in reversed(marks) if re.match(r"v2|request|not public", m)), "")
        if name in WORDS:
            general, made = mark, "questions on " if name == QUESTIONS else ""
        elif name:
            found[_plain(f"{made}{name}")] = mark or general
    return found


def _plain(name: str) -> str:
    return name[0].lower() + name[1:]


def public_by(mark: str) -> str:
    return "no" if mark.startswith("not public") else mark or "yes"


def test_the_table_is_complete():
    rows = table()
    assert len(rows) > 100
    assert len({(row.name, row.source) for row in rows}) == len(rows)
    for row in rows:
        assert row.name, row
        assert LICENCE.match(row.licence), row
        assert row.public in ("yes", "v2", "request", "no"), row
        assert (row.stand_in == "-") == (row.public in ("yes", "v2")), row


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_and_the_table_name_the_same(stage):
    config = yaml.safe_load((FOLDER / f"stage{stage}.yaml").read_text())
    comments = commented(stage)
    assert comments.keys() == config["sources"].keys()
    expected = {(row.source, _plain(row.name)): row.public for row in table() if stage in row.stages}
    found = {
        (source, name): public_by(mark) for source, comment in comments.items() for name, mark in named(comment).items()
    }
    assert found == expected
    for row in table():
        if stage in row.stages and row.public == "no":
            assert f"stand-in: {row.stand_in.split(',')[0]}" in comments[row.source], row


def test_one_set_has_one_licence():
    known: dict[str, tuple[str, str]] = {}
    for row in table():
        assert known.setdefault(row.name, (row.licence, row.public)) == (row.licence, row.public), row


def test_a_stand_in_is_something_else_that_can_be_had():
    public = {row.name for row in table() if row.public in ("yes", "v2")}
    every = {row.name for row in table()}
    for row in table():
        for part in row.stand_in.split(", or "):
            assert part not in every or part in public, row
