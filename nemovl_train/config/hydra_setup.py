"""Teaches Hydra where our configs are: `recipe=` is a config group served over `recipes/`, schemas are structured.

Everything is registered by `install()`, not found by scanning: importing nemovl changes nothing in other programs
that use Hydra in the same environment.
"""

import functools
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from nemovl_train.config.recipes import KINDS, configs_dir, recipes_dir
from nemovl_train.config.schema import RunConfig, ScheduleConfig

SCHEMAS: dict[str, type] = {"run": RunConfig, "schedule": ScheduleConfig}
PRIMARY = {"run": "train", "schedule": "schedule"}
"""The file in `configs/` that composition starts from, by kind of recipe."""


class RecipeSource(FileConfigSource):
    """Serves a folder as the config group `recipe`, at any depth: `recipe/tiny/x` is the file `tiny/x.yaml`."""

    @staticmethod
    def scheme() -> str:
        """Prefix of search path entries that this class serves."""
        return "recipes"

    @staticmethod
    def _inside(config_path: str) -> str | None:
        head, _, rest = config_path.strip("/").partition("/")
        return rest if head == "recipe" else None

    def load_config(self, config_path: str) -> ConfigResult:
        """Loads `recipe/NAME`."""
        inside = self._inside(config_path)
        assert inside is not None
        return super().load_config(inside)

    def is_group(self, config_path: str) -> bool:
        """True for the root, `recipe` and the folders below it."""
        inside = self._inside(config_path)
        return config_path == "" or (inside is not None and super().is_group(inside))

    def is_config(self, config_path: str) -> bool:
        """True for `recipe/NAME` when the file is there."""
        inside = self._inside(config_path)
        return bool(inside) and super().is_config(str(inside))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names below a group, for messages and tab completion."""
        if config_path == "":
            return ["recipe"]
        inside = self._inside(config_path)
        if inside is None:
            return []
        if inside == "" and results_filter != ObjectType.GROUP:
            # `recipe=tiny/stage...` is one value of one group: completion and messages want the names in full.
            root = Path(self.path)
            return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
        # The inherited method joins names with the group's own path and asks is_group and is_config of the result,
        # which expect the `recipe/` prefix again; a plain source over the same folder avoids the detour.
        return FileConfigSource(self.provider, self.path).list(inside, results_filter)


class NemovlSearchPath(SearchPathPlugin):
    """Adds the shipped groups and recipes behind whatever the user adds with `--config-dir`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra for every composition."""
        search_path.append(provider="nemovl", path=f"file://{configs_dir()}")
        search_path.append(provider="nemovl-recipes", path=f"recipes://{recipes_dir()}")


@functools.cache
def install() -> None:
    """Registers plugins and schemas with Hydra, once a process."""
    plugins = Plugins.instance()
    plugins.register(RecipeSource)
    plugins.register(NemovlSearchPath)
    for kind in KINDS:
        _store_schema(kind)


@contextmanager
def schema_off(kind: str) -> Iterator[None]:
    """Composes without the schema: keys that it would refuse one by one are then all seen at once."""
    ConfigStore.instance().store(name=f"{kind}_schema", node={})
    try:
        yield
    finally:
        _store_schema(kind)


def _store_schema(kind: str) -> None:
    ConfigStore.instance().store(name=f"{kind}_schema", node=_mutable(SCHEMAS[kind]), provider="nemovl")


@functools.cache
def _mutable(cls: type) -> type:
    """A dataclass like `cls` that is not frozen: OmegaConf makes frozen ones read-only, and nothing could be merged."""
    hints = typing.get_type_hints(cls)
    assert is_dataclass(cls)
    members = [(item.name, _mutable_hint(hints[item.name]), _mutable_field(item)) for item in fields(cls)]
    return make_dataclass(cls.__name__, members, kw_only=True)


def _mutable_field(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return field(default=item.default)
    if item.default_factory is not MISSING:
        factory = item.default_factory
        twin = _mutable(factory) if isinstance(factory, type) and is_dataclass(factory) else factory
        return field(default_factory=twin)
    return field()


def _mutable_hint(hint: Any) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return _mutable(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        # OmegaConf cannot add an entry of a typed mapping key by key (`+data.sources.x.path=p`); `build` checks it.
        return dict[str, Any]
    if origin is tuple:
        return types.GenericAlias(origin, tuple(_mutable_hint(arg) for arg in args))
    return hint
