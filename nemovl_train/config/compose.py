"""`recipe=NAME key=value ...` to a checked config object. Nothing here imports torch or megatron-core."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemovl_train.config.build import build
from nemovl_train.config.hydra_setup import PRIMARY, SCHEMAS, install, schema_off
from nemovl_train.config.nearest import did_you_mean
from nemovl_train.config.recipes import list_groups, list_recipes, recipe_kind, recipe_path
from nemovl_train.config.schema import ClusterConfig, RunConfig, ScheduleConfig, StageConfig
from nemovl_train.config.validate import validate_run, validate_schedule
from nemovl_train.exceptions import ConfigError

__all__ = ["compose_run", "compose_schedule", "compose_stage", "from_hydra", "list_recipes", "recipe_kind"]

_VERBS = {"run": "train", "schedule": "schedule"}
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException)


def compose_run(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, object] | None = None,
    config_dirs: Sequence[Path] = (),
) -> RunConfig:
    """Composes one stage or fine-tune.

    Args:
        recipe: Name of a shipped recipe, or path of a recipe file that ends in `.yaml`.
        overrides: Hydra overrides, as typed on the command line.
        values: Plain values by dotted key, set last: for programs, whose paths need no quoting then.
        config_dirs: More folders with config groups, searched first (`--config-dir`).

    Raises:
        ConfigError: Every problem that was found, together.
    """
    config = _compose("run", recipe, overrides, values or {}, config_dirs)
    assert isinstance(config, RunConfig)
    return config


def compose_schedule(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, object] | None = None,
    config_dirs: Sequence[Path] = (),
) -> ScheduleConfig:
    """Composes a schedule and, to find mistakes before the first stage runs, each of its stages.

    Args:
        recipe: As in `compose_run`.
        overrides: As in `compose_run`; a stage's own are in `stages`.
        values: As in `compose_run`.
        config_dirs: As in `compose_run`.

    Raises:
        ConfigError: Every problem of the schedule and of all its stages, together.
    """
    config = _compose("schedule", recipe, overrides, values or {}, config_dirs)
    assert isinstance(config, ScheduleConfig)
    _check_stages(config)
    return config


def compose_stage(
    schedule: ScheduleConfig, stage: StageConfig, *, values: Mapping[str, object] | None = None
) -> RunConfig:
    """Composes one stage of a schedule: same run folder and hardware, its overrides, then `values` (as `init_from`).

    Raises:
        ConfigError: Every problem that was found, together.
    """
    shared: dict[str, object] = {"run.root": schedule.run.root, "run.name": schedule.run.name}
    overrides = list(stage.overrides)
    own_cluster = any(text.startswith("cluster=") for text in overrides)
    if schedule.cluster != ClusterConfig() and not own_cluster:
        if schedule.cluster.name:
            overrides.insert(0, f"cluster={schedule.cluster.name}")
        shared |= {f"cluster.{key}": value for key, value in asdict(schedule.cluster).items()}
    return compose_run(stage.recipe, overrides, values={**shared, **(values or {})})


def from_hydra(kind: str, config: DictConfig) -> RunConfig | ScheduleConfig:
    """Checks a config that Hydra composed (each job of a sweep).

    Raises:
        ConfigError: Every problem that was found, together.
    """
    problems: list[str] = []
    result = _to_object(kind, config, problems)
    if problems:
        raise ConfigError(problems)
    if isinstance(result, ScheduleConfig):
        _check_stages(result)
    return result


def _check_stages(config: ScheduleConfig) -> None:
    problems: list[str] = []
    stages: list[RunConfig] = []
    for index, stage in enumerate(config.stages):
        try:
            stages.append(compose_stage(config, stage))
        except ConfigError as error:
            problems += [f"stages.{index} ({stage.recipe}): {problem}" for problem in error.problems]
    if not problems:
        problems = validate_schedule(config, stages)
    if problems:
        raise ConfigError(problems)


def _compose(
    kind: str, recipe: str, overrides: Sequence[str], values: Mapping[str, object], config_dirs: Sequence[Path]
) -> RunConfig | ScheduleConfig:
    other = recipe_kind(recipe)
    if other != kind:
        raise ConfigError([f"recipe={recipe} is a {other} recipe; type: nemovl {_VERBS[other]} recipe={recipe}"])
    search, name = search_path_overrides(recipe, config_dirs)
    base = [*search, f"recipe={name}"]
    parsed, problems = _parse_overrides(overrides)
    if problems:
        raise ConfigError([*problems, *_compose_loosely(kind, base, parsed, values, config_dirs)[1]])
    try:
        result = _to_object(kind, _hydra_compose(kind, [*base, *overrides], values), problems)
    except _COMPOSE_ERRORS as error:
        # What Hydra refuses and our own schema allows is fine: `data.sources.x.path=p` without its plus sign.
        found, problems = _compose_loosely(kind, base, parsed, values, config_dirs)
        if found is None or problems:
            raise ConfigError(problems or [_one_line(error)]) from error
        result = found
    if problems:
        raise ConfigError(problems)
    return result


def search_path_overrides(recipe: str, config_dirs: Sequence[Path] = ()) -> tuple[list[str], str]:
    """Hydra overrides that add folders to its search path, and the name under which the recipe is found there.

    Raises:
        ConfigError: A folder or the recipe does not exist.
    """
    entries = []
    for folder in config_dirs:
        if not folder.is_dir():
            raise ConfigError([f"--config-dir {folder}: there is no such folder"])
        entries.append(f"file://{folder.resolve()}")
    path = recipe_path(recipe)
    if recipe.endswith(".yaml"):
        entries.append(f"recipes://{path.parent}")
        recipe = path.stem
    return ([f"hydra.searchpath=[{','.join(map(_quoted, entries))}]"] if entries else []), _quoted(recipe)


def _quoted(text: str) -> str:
    """A string that Hydra's override grammar takes as it is."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _hydra_compose(kind: str, overrides: Sequence[str], values: Mapping[str, object]) -> DictConfig:
    install()
    with initialize(config_path=None, version_base="1.3", job_name="nemovl"):
        config = compose(config_name=PRIMARY[kind], overrides=list(overrides))
    for key, value in values.items():
        OmegaConf.update(config, key, value, merge=False)
    return config


def _to_object(kind: str, config: DictConfig, problems: list[str]) -> RunConfig | ScheduleConfig:
    """Builds and validates; appends every problem."""
    plain = _resolve(config, problems)
    result: object = build(SCHEMAS[kind], plain, problems)
    assert isinstance(result, RunConfig | ScheduleConfig)
    if isinstance(result, RunConfig):
        named = {problem.split("=")[0].split(" ")[0] for problem in problems}
        # A value that could not be read was replaced by a default: complaining about that one too would mislead.
        problems += [p for p in validate_run(result) if p.split("=")[0].split(" ")[0] not in named]
    return result


def _resolve(config: DictConfig, problems: list[str]) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        where = error.full_key or "a value"
        problems.append(f"{where} refers to something that is not there: {str(error).splitlines()[0]}")
        plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _parse_overrides(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides that can be read, and the problems of those that cannot."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"{text}: not understood; write key=value ({str(error).splitlines()[0]})")
            continue
        if override.is_sweep_override():
            problems.append(f"{text}: several values for one run; add -m for one run each, or quote the value")
        elif override.key_or_group == "recipe":
            problems.append(f"{text}: give the recipe once")
        else:
            parsed.append(override)
    return parsed, problems


def _compose_loosely(
    kind: str,
    base: Sequence[str],
    overrides: Sequence[Override],
    values: Mapping[str, object],
    config_dirs: Sequence[Path],
) -> tuple[RunConfig | ScheduleConfig | None, list[str]]:
    """Composes without Hydra's checks, which stop at the first problem, and with ours, which collect all.

    Returns:
        The config, None when it cannot be composed at all, and the problems.
    """
    groups = list_groups(config_dirs)
    problems: list[str] = []
    loose: list[str] = []
    for override in overrides:
        key, value, text = override.key_or_group, override.value(), str(override.input_line)
        if key in groups and isinstance(value, str) and value not in groups[key] and not override.is_delete():
            problems.append(f"{key}={value} is not an option of this group{did_you_mean(value, groups[key])}")
        elif override.is_delete() or key in groups or key.startswith("hydra"):
            loose.append(text)
        else:
            loose.append(f"++{text.lstrip('+')}")
    try:
        with schema_off(kind):
            config = _hydra_compose(kind, [*base, *loose], {})
    except _COMPOSE_ERRORS:
        return None, problems
    OmegaConf.set_struct(config, False)
    # Without the schema its defaults are missing too, and recipes refer to some of them.
    merged = OmegaConf.merge(asdict(SCHEMAS[kind]()), config)
    assert isinstance(merged, DictConfig)
    for name, wanted in values.items():
        OmegaConf.update(merged, name, wanted, merge=False)
    return _to_object(kind, merged, problems), problems


def _one_line(error: Exception) -> str:
    """Hydra's message and the reason behind it, without the lines that only name internals."""
    lines = str(error).splitlines() + (str(error.__cause__).splitlines()[:1] if error.__cause__ else [])
    return re.sub(r"\s+", " ", " ".join(lines)).strip() or type(error).__name__
