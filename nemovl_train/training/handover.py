"""What a finished stage hands on: that the parts it promised to leave alone are its parent's, bit by bit, and its
evaluation. A schedule takes a stage for done when this record says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.files import replace_text
from nemovl_train.exceptions import RunFailedError
from nemovl_train.model.vlm import ATTRIBUTES
from nemovl_train.parallel.agree import from_every_rank, on_first_rank

if TYPE_CHECKING:
    from nemovl_train.model.vlm import NemotronVL
    from nemovl_train.training.trainer import Trainer

FILE = "handover.json"
_BYTES_AT_A_TIME = 2**30


def hand_over(trainer: Trainer, evaluation: dict[str, Any]) -> None:
    """Compare frozen parts with the parent's and write the record. Collective.

    A parent that is no longer there, or was made again, cannot be compared with; the record says so.

    Args:
        trainer: A stage after its last step.
        evaluation: What its evaluation gave; empty where the config asks for none.

    Raises:
        RunFailedError: A frozen part differs. The stage is not done then, and no other starts from it.
    """
    config, state, folder = trainer.config, trainer.state, trainer.folder.path
    frozen = [part for part in trainer.model.part_modules() if part not in config.trainer.train]
    parent = on_first_rank(lambda: _parent(state.parent, state.parent_seal))
    # DeepSpeed holds weights in pieces of its own, and adapters leave every weight of their base alone.
    plain = config.engine.name == "megatron" and not config.adapter.rank
    compared = frozen if parent is not None and plain else []
    changed = changed_tensors(trainer.model, compared, parent) if compared and parent is not None else []
    record = {
        "step": state.step,
        "parent": state.parent,
        "parent_seal": state.parent_seal,
        "frozen": frozen,
        "unchanged": [part for part in compared if not any(name.startswith(ATTRIBUTES[part]) for name in changed)],
        "changed_tensors": changed,
        "evaluation": {name: row.get("loss") for name, row in evaluation.get("sources", {}).items()} or None,
    }
    on_first_rank(lambda: replace_text(folder / FILE, json.dumps(record, indent=1)))
    if changed:
        raise RunFailedError(
            f"{folder}: trainer.train={list(config.trainer.train)}, and yet {len(changed)} tensors differ from "
            f"{state.parent}, {changed[0]} among them; the stage is not handed on"
        )


def read_handover(stage: Path) -> dict[str, Any]:
    """The record of a stage; empty where there is none, as in folders that are older than it."""
    path = stage / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def changed_tensors(model: NemotronVL, parts: list[str], checkpoint: Path) -> list[str]:
    """Names of a model's tensors that are not bitwise those of a checkpoint, in the model's formats. Collective.

    Args:
        model: On any layout: every rank compares what it holds.
        parts: Parts to look at.
        checkpoint: Whose.
    """
    prefixes = tuple(f"{ATTRIBUTES[part]}." for part in parts)
    whole = {name: entry for name, entry in model.sharded_state_dict().items() if name.startswith(prefixes)}
    mine = []
    for some in _batches(whole):
        empty = {name: replace(entry, data=torch.empty_like(entry.data)) for name, entry in some.items()}
        read = sealed.read_sharded({"model": empty}, checkpoint / sealed.SHARDED)["model"]
        mine += [name for name, entry in some.items() if not torch.equal(read[name], entry.data)]
    return sorted(set().union(*from_every_rank(mine)))


def _batches(entries: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Some at a time, so that a copy of a whole part need not fit beside it."""
    some: dict[str, Any] = {}
    held = 0
    for name, entry in entries.items():
        some[name] = entry
        held += entry.data.numel() * entry.data.element_size()
        if held >= _BYTES_AT_A_TIME:
            yield some
            some, held = {}, 0
    if some:
        yield some


def _parent(folder: str | None, seal: str | None) -> Path | None:
    """The parent, where it is still the one that the stage started from."""
    if folder is None or seal is None or sealed.seal_of(Path(folder)) != seal:
        return None
    return Path(folder)
