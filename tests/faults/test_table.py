"""The table of faults in the documents is the one that the tests know, and its tests exist."""

import os
import re
from pathlib import Path

from table import ROWS, markdown

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
PART = re.compile(r"(<!-- faults: begin -->\n).*(<!-- faults: end -->)", re.DOTALL)


def test_the_page_holds_the_table():
    """`UPDATE_GOLDEN=1` writes it."""
    text = PAGE.read_text()
    wanted = PART.sub(lambda found: f"{found[1]}{markdown()}{found[2]}", text)
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(wanted)
    assert text == wanted or os.environ.get("UPDATE_GOLDEN")


def test_every_fault_has_tests_that_exist():
    assert len(ROWS) == 31
    for row in ROWS:
        assert row.tests, row.fault
        for test in row.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (TESTS / file).read_text(), test
