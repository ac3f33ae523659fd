"""The page of all options, made of the dataclasses and their docstrings, so that it cannot fall behind them."""

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from nemovl_train.config.build import option_types

_HEAD = """# Every option

Made from the docstrings of `nemovl_train/config/schema.py`, `data_pipelines/config.py` and `launch/site.py`; change
those, then `UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/docs/test_config_reference.py`.

The defaults are the schema's. A recipe sets many of them: `nemovl train recipe=NAME --cfg job --resolve` shows what a
run has, `--info defaults` where each value comes from. `NAME` in a key stands for a name of your own.
"""


def reference(roots: Mapping[str, tuple[type, str]]) -> str:
    """The whole page in Markdown.

    Args:
        roots: By heading: a config class, and what stands before its keys.
    """
    lines = [_HEAD]
    seen: set[type] = set()
    for heading, (cls, prefix) in roots.items():
        lines += [f"## {heading}\n", *_section(cls, prefix, seen)]
    return "\n".join(lines).rstrip() + "\n"


def attribute_docs(cls: type) -> dict[str, str]:
    """What a class's docstring says about its attributes, line breaks taken out."""
    text = inspect.cleandoc(cls.__doc__ or "")
    _, found, body = text.partition("Attributes:\n")
    if not found:
        return {}
    docs: dict[str, str] = {}
    name = ""
    for line in body.splitlines():
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name, docs[start.group(1)] = start.group(1), start.group(2)
        elif line.startswith("        ") and name:
            docs[name] += f" {line.strip()}"
        elif line.strip():
            break
    return docs


def _section(cls: type, prefix: str, seen: set[type]) -> Iterator[str]:
    """Options of a class, then the classes inside it; one that was there already is named, not repeated."""
    seen.add(cls)
    hints, docs = typing.get_type_hints(cls), attribute_docs(cls)
    assert is_dataclass(cls)
    own = [item for item in fields(cls) if _inner(hints[item.name]) is None]
    if own:
        yield f"{_about(cls)}\n"
        yield "| option | type | default | meaning |"
        yield "|---|---|---|---|"
        types = option_types(cls)
        for item in own:
            meaning = docs.get(item.name, "").replace("|", "\\|")
            default = _default(item).replace("|", "\\|")
            yield f"| `{prefix}{item.name}` | {_plain(types[item.name])} | {default} | {meaning} |"
        yield ""
    for item in fields(cls):
        inner = _inner(hints[item.name])
        if inner is None:
            continue
        kind, many = inner
        key = f"{prefix}{item.name}.{'NAME.' if many else ''}"
        if kind in seen:
            yield f"`{key}*`: as above.\n"
            continue
        yield f"### {key.rstrip('.')}\n"
        if item.name in docs:
            yield f"{docs[item.name]}\n"
        yield from _section(kind, key, seen)


def _about(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def _inner(hint: Any) -> tuple[type, bool] | None:
    """The config class behind a field, and whether there are many of it."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint, False
    for arg in typing.get_args(hint):
        if isinstance(arg, type) and is_dataclass(arg):
            return arg, True
    return None


def _plain(name: str) -> str:
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    if name in words:
        return words[name]
    if name.startswith("tuple"):
        return "list"
    if name.startswith("dict"):
        return "mapping"
    return " or ".join(words.get(part.strip(), "empty") for part in name.split("|"))


def _default(item: Field[Any]) -> str:
    value = item.default if item.default is not MISSING else None
    if item.default_factory is not MISSING:
        value = item.default_factory()
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(part) for part in value)}]`"
    if value in ("", {}):
        return "empty"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"
