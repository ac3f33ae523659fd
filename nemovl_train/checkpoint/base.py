"""Checkpoints of adapters, and the checkpoint that each builds on: named by its folder, identified by its seal."""

import json
from pathlib import Path

from nemovl_train.checkpoint import sealed
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import CheckpointError
from nemovl_train.parallel.agree import on_first_rank


def adapter_run(folder: Path) -> RunConfig | None:
    """Config of the run that made a checkpoint of adapters; None for a checkpoint of a whole model."""
    written = folder.parent.parent / "config.yaml"
    if not written.is_file():
        return None
    run = load_yaml(RunConfig, written)
    return run if run.adapter.rank else None


def refuse_adapters(folder: Path) -> None:
    """Raise CheckpointError for a checkpoint that holds no whole model."""
    if adapter_run(folder) is not None:
        raise CheckpointError(
            f"{folder} holds adapters alone, not a whole model: make one with `nemovl convert merge {folder} --out DIR`"
        )


def base_of(folder: Path, base: Path | None = None) -> Path:
    """Folder of the base, after a look at its seal.

    Args:
        folder: A checkpoint of adapters.
        base: Where the base is now; None where it was when training started.

    Raises:
        CheckpointError: It is not there, or is another one.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    found = Path(state["parent"]) if base is None else base
    seal = sealed.seal_of(found)
    if seal is None:
        raise CheckpointError(
            f"{folder} holds adapters alone; the model that they adapt is not at {found}: bring that checkpoint back"
        )
    if seal != state["parent_seal"]:
        raise CheckpointError(
            f"{found} is not the checkpoint that {folder} was trained on (its seal differs); bring that one back"
        )
    return found


def load_base(folder: Path, model: sealed.ShardedModel) -> None:
    """Fill a model, still without adapters, with the weights that a checkpoint of adapters builds on. Collective.

    Raises:
        CheckpointError: As `base_of`, or the base is damaged or of another model.
    """
    found = on_first_rank(lambda: base_of(folder))
    sealed.load(found, model=model)
