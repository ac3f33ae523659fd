"""Where the shipped recipes and config groups lie, and what is in them. Reads YAML only: no Hydra, no torch."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from nemovl_train.config.nearest import did_you_mean
from nemovl_train.exceptions import ConfigError, UserError

KINDS = ("run", "schedule")


def _shipped(folder: str) -> Path:
    """Folder beside the packages in a checkout or editable install, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / f"_{folder}"
    return installed if installed.is_dir() else package.parent / folder


def recipes_dir() -> Path:
    """Folder of the shipped recipes."""
    return _shipped("recipes")


def configs_dir() -> Path:
    """Folder of the shipped Hydra groups."""
    return _shipped("configs")


def list_recipes() -> list[str]:
    """Names of the shipped recipes, as `recipe=NAME` takes them."""
    root = recipes_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def list_groups(extra: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Options of every config group.

    Args:
        extra: Folders of one's own that are searched as well.
    """
    groups: dict[str, set[str]] = {}
    for root in (configs_dir(), *extra):
        for path in root.glob("*/**/*.yaml"):
            group, *option = path.relative_to(root).with_suffix("").parts
            groups.setdefault(group, set()).add("/".join(option))
    return {name: sorted(options) for name, options in sorted(groups.items())}


def recipe_path(name: str) -> Path:
    """File of a recipe.

    Args:
        name: Name of a shipped recipe, or the path of a recipe file of one's own (ends in `.yaml`).

    Raises:
        ConfigError: There is no such recipe.
    """
    if name.endswith(".yaml"):
        path = Path(name).expanduser()
        if path.is_file():
            return path.resolve()
        raise ConfigError([f"recipe={name}: there is no such file"])
    path = recipes_dir() / f"{name}.yaml"
    # A name that climbs out of the folder is not a recipe, even when a file happens to be there.
    if name in list_recipes() and path.is_file():
        return path
    raise ConfigError([f"recipe={name} is not among `nemovl recipes list`{did_you_mean(name, list_recipes())}"])


def recipe_kind(name: str) -> str:
    """`run` for a stage or fine-tune, `schedule` for a chain of them.

    Raises:
        ConfigError: There is no such recipe, or the file is not a YAML mapping.
    """
    return "schedule" if "stages" in read_recipe(recipe_path(name)) else "run"


def read_recipe(path: Path) -> dict[str, object]:
    """The file's own keys, not composed.

    Raises:
        ConfigError: The file is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path} must hold keys and values"])
    return content


def describe(name: str) -> str:
    """First line of the recipe's header comment that is prose."""
    for line in recipe_path(name).read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if line.startswith("#") and text and not text.startswith("@"):
            return text
    return ""


def copy_recipe(name: str, target: Path) -> Path:
    """Copies a recipe so that it can be edited and run as `recipe=PATH.yaml`.

    Raises:
        UserError: The target exists, or is not a `.yaml` file.
    """
    source = recipe_path(name)
    target = target / source.name if target.is_dir() else target
    if target.suffix != ".yaml":
        raise UserError(f"{target}: a recipe file ends in .yaml")
    if target.exists():
        raise UserError(f"{target} exists; choose another name or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return target
