"""Plain values to frozen dataclasses, and back to dotted keys. Every problem is collected, none stops the walk."""

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from nemovl_train.config.nearest import nearest_key

REQUIRED = "???"
"""OmegaConf's mark of a value that a config must still be given."""


class _UnusableError(Exception):
    """The value was reported as a problem; the field keeps its default."""


def build[T](cls: type[T], values: Mapping[str, Any], problems: list[str]) -> T:
    """Makes a config object of nested plain values.

    Args:
        cls: Root dataclass.
        values: Nested mappings, lists and scalars.
        problems: Receives one sentence for every unknown key and unusable value. Such a key is left out and such a
            value replaced by the default, so that the object can still be checked further.
    """
    return _dataclass(cls, values, "", problems, frozenset(option_types(cls)))


def option_types(cls: type, prefix: str = "") -> dict[str, str]:
    """Every option below a config class as dotted key -> type; `NAME` stands for a free key of a mapping."""
    found: dict[str, str] = {}
    for item, hint in _fields(cls):
        key = f"{prefix}{item.name}"
        inner = _section_of(hint)
        if is_dataclass(hint) and isinstance(hint, type):
            found |= option_types(hint, f"{key}.")
        elif inner is not None:
            found |= option_types(inner, f"{key}.NAME.")
        else:
            found[key] = _type_name(hint)
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value); an empty mapping is a leaf."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fields(cls: type) -> Iterator[tuple[Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    assert is_dataclass(cls)
    return ((item, hints[item.name]) for item in fields(cls))


def _section_of(hint: Any) -> type | None:
    """The dataclass X of `dict[str, X]` or `tuple[X, ...]`."""
    for arg in typing.get_args(hint):
        if isinstance(arg, type) and is_dataclass(arg):
            return arg
    return None


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(item: Field[Any], hint: Any) -> Any:
    if item.default is not MISSING:
        return item.default
    if item.default_factory is not MISSING:
        return item.default_factory()
    return hint() if hint in (str, int, float, bool) else None


def _dataclass(cls: type, values: Any, path: str, problems: list[str], known: frozenset[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{path}={values!r}: this is a section with keys of its own, not a value")
        return _dataclass(cls, {}, path, problems, known)
    members = {item.name: (item, hint) for item, hint in _fields(cls)}
    here = f"{path}." if path else ""
    for name in values:
        if name not in members:
            problems.extend(_unknown(f"{here}{name}", values[name], known))
    kwargs = {}
    for name, (item, hint) in members.items():
        kwargs[name] = _default(item, hint)
        value = values.get(name, MISSING)
        if value == REQUIRED or (value is MISSING and item.default is MISSING and item.default_factory is MISSING):
            problems.append(f"{here}{name} is missing; add +{here}{name}=VALUE")
        elif value is not MISSING:
            try:
                kwargs[name] = _value(hint, value, f"{here}{name}", problems, known)
            except _UnusableError as why:
                problems.append(f"{here}{name}={value!r}: {why}")
    return cls(**kwargs)


def _unknown(path: str, value: Any, known: frozenset[str]) -> Iterator[str]:
    leaves = [key for key, _ in flatten({path: value})]
    for leaf in leaves:
        generic = _generic(leaf, known)
        match = nearest_key(generic, _with_sections(known) if leaf == path else known)
        if match is None:
            section = generic.rpartition(".")[0]
            siblings = sorted(key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section)
            yield f"{leaf} is not an option; " + (
                f"{section} has {', '.join(siblings)}" if section and siblings else "`--cfg job` shows all of them"
            )
        else:
            yield f"{leaf} is not an option; did you mean {_specific(match, leaf, generic)}?"


def _with_sections(known: frozenset[str]) -> set[str]:
    """The options and the sections that they are in, so that `optm` finds `optim`."""
    words = [key.split(".") for key in known]
    return {".".join(parts[:depth]) for parts in words for depth in range(1, len(parts) + 1)}


def _generic(key: str, known: frozenset[str]) -> str:
    """Writes the free key of a mapping (`data.sources.digits.pth`) as NAME, so that siblings can be compared."""
    words = key.split(".")
    for option in known:
        at = option.split(".").index("NAME") if ".NAME." in option else 0
        if at and len(words) > at and words[:at] == option.split(".")[:at]:
            return ".".join([*words[:at], "NAME", *words[at + 1 :]])
    return key


def _specific(match: str, key: str, generic: str) -> str:
    if ".NAME." not in match or ".NAME." not in generic:
        return match
    at = generic.split(".").index("NAME")
    return match.replace("NAME", key.split(".")[at], 1)


def _value(hint: Any, value: Any, path: str, problems: list[str], known: frozenset[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, path, problems, known)
    if isinstance(hint, type) and is_dataclass(hint):
        return _dataclass(hint, value, path, problems, known)
    if origin is tuple:
        return _tuple(args, value, path, problems, known)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _UnusableError("this is a mapping of names to values")
        return {str(k): _value(args[1], v, f"{path}.{k}", problems, known) for k, v in value.items()}
    return _scalar(hint, value)


def _tuple(args: tuple[Any, ...], value: Any, path: str, problems: list[str], known: frozenset[str]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _UnusableError(f"this is a list; write [{value}]")
    hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(hints) != len(value):
        raise _UnusableError(f"this list has {len(hints)} entries, not {len(value)}")
    return tuple(
        _value(hint, item, f"{path}.{index}", problems, known)
        for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _scalar(hint: type, value: Any) -> Any:
    """Accepts what OmegaConf accepts for a typed field, so that both ways of composing agree."""
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    if isinstance(value, bool) or hint is bool:
        if hint is bool and isinstance(value, bool):
            return value
        if hint is not str:
            raise _UnusableError(f"this is {wanted}")
    if value is None or isinstance(value, Mapping | list | tuple):
        raise _UnusableError(f"this is {wanted}")
    if hint is int and isinstance(value, float):
        raise _UnusableError(f"this is {wanted}")
    try:
        return hint(value)
    except ValueError as error:
        raise _UnusableError(f"this is {wanted}") from error
