"""Text and functions of Python's own standard library (PSF licence), split by module so that splits share no source."""

import ast
import re
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_pipelines.demo.keyed import split_of
from data_pipelines.exceptions import DataError

_PARAGRAPH_CHARS = (60, 320)
_MIN_MODULES = 60


@dataclass(frozen=True)
class PythonFunction:
    """One documented function, cut where a completion starts.

    Attributes:
        module: Module it comes from.
        name: Name of the function.
        docstring: Its cleaned docstring.
        head: Decorators, signature and docstring, dedented.
        body: The rest, dedented to its own first column.
        source: The whole function, dedented.
    """

    module: str
    name: str
    docstring: str
    head: str
    body: str
    source: str


@cache
def modules() -> dict[str, str]:
    """Source of the top-level modules by name, in name order.

    Site-specific files beside them (sitecustomize, build settings) are left out: they differ between machines.

    Raises:
        DataError: The installed Python carries no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(root.glob("*.py"))
        if path.stem in sys.stdlib_module_names and not path.stem.startswith("_")
    }
    if len(found) < _MIN_MODULES:
        raise DataError(
            f"only {len(found)} source modules of the standard library under {root}; demo data needs them: "
            "use a full Python 3.12 (on Debian: apt install libpython3.12-stdlib)"
        )
    return found


def functions(split: str) -> tuple[PythonFunction, ...]:
    """Documented functions of the split's modules, in source order; a copy in another module is dropped."""
    return tuple(function for function in _all_functions() if split_of(function.module) == split)


def paragraphs(split: str) -> tuple[str, ...]:
    """Plain prose from the docstrings of the split's modules: one line each, ASCII, no text in both splits."""
    return tuple(text for text, module in _all_paragraphs().items() if split_of(module) == split)


@cache
def _definitions() -> tuple[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef], ...]:
    """(module, node) of everything that can carry a docstring, in source order."""
    found: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = []

    def visit(module: str, node: ast.AST) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            found.append((module, node))
        # Statements only: walking every expression, as ast.walk does, costs ten times as much.
        for part in ("body", "handlers", "orelse", "finalbody"):
            for child in getattr(node, part, ()):
                visit(module, child)

    for name, source in modules().items():
        visit(name, ast.parse(source))
    return tuple(found)


@cache
def _all_functions() -> tuple[PythonFunction, ...]:
    found: dict[str, PythonFunction] = {}
    lines = {module: source.splitlines() for module, source in modules().items()}
    for module, node in _definitions():
        if isinstance(node, ast.FunctionDef):
            function = _cut(module, node, lines[module])
            if function is not None:
                found.setdefault(function.body, function)
    return tuple(found.values())


@cache
def _all_paragraphs() -> dict[str, str]:
    """Module by paragraph: the first module in name order owns a paragraph that several have."""
    found: dict[str, str] = {}
    for module, node in _definitions():
        for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            text = " ".join(block.split())
            if _is_prose(text):
                found.setdefault(text, module)
    return found


def _is_prose(text: str) -> bool:
    low, high = _PARAGRAPH_CHARS
    if not (low <= len(text) <= high and text.isascii() and text[0].isupper() and text.endswith(".")):
        return False
    return ">>>" not in text and "<" not in text and sum(c.isalpha() or c == " " for c in text) >= 0.9 * len(text)


def _cut(module: str, node: ast.FunctionDef, lines: list[str]) -> PythonFunction | None:
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2 or node.end_lineno is None:
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    split_at = node.body[0].end_lineno or 0
    if node.body[1].lineno <= split_at:  # two statements on one line: nothing clean to cut
        return None
    parts = (lines[start:split_at], lines[split_at : node.end_lineno], lines[start : node.end_lineno])
    head, body, source = (textwrap.dedent("\n".join(part)).strip("\n") for part in parts)
    if not source.isascii():
        return None
    return PythonFunction(module, node.name, docstring, head, body, source)
