"""Checkpoints of adapters, and the checkpoint that each builds on: named by its folder, identified by its seal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.storage import INDEX
from nemovl_train.config.dump import load_yaml, to_plain
from nemovl_train.config.schema import RunConfig
from nemovl_train.exceptions import CheckpointError
from nemovl_train.parallel.agree import on_first_rank

_PAIR = ".adapter.lora_a"
"""In the name of every adapter's first matrix; no parameter of a whole model has it."""


def holds_adapters(folder: Path) -> bool:
    """Whether a checkpoint holds adapters alone, wherever it was copied to."""
    index = folder / sealed.SHARDED / INDEX
    return index.is_file() and _PAIR in index.read_text(encoding="utf-8")


def adapter_run(folder: Path) -> RunConfig | None:
    """Config of the run that made a checkpoint of adapters; None for a checkpoint of a whole model.

    Raises:
        CheckpointError: It holds adapters and is not in its stage's folder, or the config there names other ones.
    """
    if not holds_adapters(folder):
        return None
    written = folder.parent.parent / "config.yaml"
    if not written.is_file():
        raise CheckpointError(
            f"{folder} holds adapters alone and was moved out of its stage: {written}, which says of which layers, is "
            "missing; bring it back, or copy the whole stage folder"
        )
    run = load_yaml(RunConfig, written)
    _refuse_other_adapters(folder, run, written)
    return run


def _refuse_other_adapters(folder: Path, run: RunConfig, written: Path) -> None:
    """The config may have been rewritten since: a start with other options that ended before it saved."""
    saved = _state(folder).get("adapter")
    now = to_plain(run)["adapter"]
    if saved is None or saved == now:  # None in states that are older than this field
        return
    keys = [key for key in now if saved.get(key) != now[key]]
    then = ", ".join(f"adapter.{key}={json.dumps(saved.get(key))}" for key in keys)
    says = ", ".join(f"adapter.{key}={json.dumps(now[key])}" for key in keys)
    raise CheckpointError(
        f"{folder} was saved with {then}; {written} says {says} since: write the former back there, or name a "
        "checkpoint that was saved after the change"
    )


def refuse_adapters(folder: Path) -> None:
    """Raise CheckpointError for a checkpoint that holds no whole model."""
    if holds_adapters(folder):
        raise CheckpointError(
            f"{folder} holds adapters alone, not a whole model: make one with `nemovl convert merge {folder} --out DIR`"
        )


def parent_of(folder: Path) -> Path | None:
    """The checkpoint that a checkpoint's run started from, where it is still to be found; else None."""
    state = _state(folder)
    return next((path for path in _places(folder, state) if _seal_fits(path, state)), None)


def base_of(folder: Path, base: Path | None = None) -> Path:
    """Folder of the base, after a look at its seal.

    Args:
        folder: A checkpoint of adapters.
        base: Where the base is now; None where it was when training started, or beside the adapters' stage as then.

    Raises:
        CheckpointError: It is not there, is another one, or the adapters do not say which one it was.
    """
    found = base if base is not None else parent_of(folder)
    state = _state(folder)
    missing = [key for key in ("parent", "parent_seal") if not state.get(key)]
    if missing:
        raise CheckpointError(
            f"{folder / 'state.json'} has no {' and no '.join(missing)}, so no checkpoint can be told to be the one "
            "that these adapters were trained on; bring the folder back as training wrote it, or train them again"
        )
    looked_at = Path(state["parent"]) if found is None else found
    seal = sealed.seal_of(looked_at)
    if seal is None:
        raise CheckpointError(
            f"{folder} holds adapters alone; the model that they adapt is not at {looked_at}: "
            "bring that checkpoint back"
        )
    if seal != state["parent_seal"]:
        raise CheckpointError(
            f"{looked_at} is not the checkpoint that {folder} was trained on (its seal differs); bring that one back"
        )
    return looked_at


def load_base(folder: Path, model: sealed.ShardedModel, init_from: Path) -> None:
    """Fill a model, still without adapters, with the weights that a checkpoint of adapters builds on. Collective.

    Args:
        folder: The checkpoint.
        model: Receives the weights.
        init_from: Checkpoint or stage where the run's config has the base now: another place than when it started.

    Raises:
        CheckpointError: As `base_of`, or the base is damaged or of another model.
    """

    def find() -> Path:
        state = _state(folder)
        moved = [init_from, *sealed.published(init_from / "checkpoints"), *sealed.published(init_from)]
        try:
            return base_of(folder, next((path for path in moved if _seal_fits(path, state)), None))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; or say where it is now: trainer.init_from=DIR "
                "'checkpoint.accept_changes=[trainer.init_from]'"
            ) from error

    sealed.load(on_first_rank(find), model=model)


def _places(folder: Path, state: dict[str, Any]) -> Iterator[Path]:
    """Where the parent may be: where it was, or as far from this checkpoint as it was, in runs that were moved."""
    if state.get("parent") is None:
        return
    parent, home = Path(state["parent"]), folder.absolute()
    yield parent
    # STAGE/checkpoints/STEP of the same run, RUN/STAGE/checkpoints/STEP of one beside it.
    for words, level in ((3, 2), (4, 3)):
        if len(parent.parts) > words and len(home.parents) > level:
            yield home.parents[level].joinpath(*parent.parts[-words:])


def _seal_fits(path: Path, state: dict[str, Any]) -> bool:
    """Where an older state tells no seal, being a checkpoint is enough."""
    seal = sealed.seal_of(path)
    return seal is not None and seal == (state.get("parent_seal") or seal)


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
