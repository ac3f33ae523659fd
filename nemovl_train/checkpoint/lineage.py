"""Whose weights a stage goes back to. Written when it starts, so that the record outlives the checkpoints it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import parent_of
from nemovl_train.checkpoint.files import replace_text

FILE = "lineage.json"


def write_lineage(stage: Path, parent: Path) -> None:
    """Note in a stage's folder where its weights come from.

    Args:
        stage: The stage's folder.
        parent: Checkpoint that it starts from.
    """
    replace_text(stage / FILE, json.dumps(_from(parent), indent=1))


def lineage_of(checkpoint: Path) -> list[dict[str, Any]]:
    """Ancestors of a checkpoint, the nearest first; none for initial weights and imports.

    Each is `stage`, `step` and `trained` parts, or the name of what was imported, with the `integrity` that seals it.
    A stage without such a record is followed as far as its parents are still there; of one that is not, name and seal.
    """
    state = _state(checkpoint)
    if not state.get("parent"):
        return []
    seal = state.get("parent_seal")
    written = _written(_home(checkpoint))
    # A start that failed may have left the record of another parent.
    if written and seal in (None, written[0].get("integrity")):
        return written
    parent = parent_of(checkpoint)
    lost = {"stage": "/".join(Path(state["parent"]).parts[-4:-2]), "integrity": seal}
    return [lost] if parent is None else _from(parent)


def _from(parent: Path) -> list[dict[str, Any]]:
    state = _state(parent)
    entry: dict[str, Any]
    if "source" in state:
        entry = {"imported": state["source"]}
    else:
        entry = {"stage": "/".join(_home(parent).parts[-2:]), "step": state.get("step")} | _trained(parent)
    return [entry | {"integrity": sealed.seal_of(parent)}, *lineage_of(parent)]


def _written(stage: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((stage / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _trained(checkpoint: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((_home(checkpoint) / "config.yaml").read_text(encoding="utf-8"))
        return {"trained": list(config["trainer"]["train"])}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}


def _home(checkpoint: Path) -> Path:
    return checkpoint.parent.parent


def _state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
