"""What a finished stage hands on: that the parts it promised to leave alone are its parent's, bit by bit, and its
evaluation. A schedule takes a stage for done when this record says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import parent_of
from nemovl_train.checkpoint.files import replace_text
from nemovl_train.exceptions import RunFailedError
from nemovl_train.model.vlm import ATTRIBUTES
from nemovl_train.parallel.agree import from_every_rank, on_first_rank
from nemovl_train.parallel.turns import in_turns

if TYPE_CHECKING:
    from nemovl_train.model.vlm import NemotronVL
    from nemovl_train.training.trainer import Trainer

# isort: split
from megatron.core.dist_checkpointing.mapping import is_main_replica

log = logging.getLogger(__name__)

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
    own = sealed.step_folder(trainer.folder.checkpoints, state.step)
    parent = on_first_rank(lambda: parent_of(own) if state.parent is not None else None)
    # DeepSpeed holds weights in pieces of its own, and adapters leave every weight of their base alone.
    plain = config.engine.name == "megatron" and not config.adapter.rank
    compared = frozen if parent is not None and plain else []
    changed: list[str] = []
    if compared and parent is not None:
        # A parent that rotted since is no word against this stage.
        trainer.watchdog.beat()
        compared = compared if _is_sound(parent) else []
        trainer.watchdog.beat()
        at_once = config.checkpoint.nodes_at_once
        mine = in_turns(lambda: changed_tensors(trainer.model, compared, parent, trainer.watchdog.beat), at_once)
        changed = sorted(set().union(*from_every_rank(mine)))
    record = {
        "step": state.step,
        "parent": state.parent,
        "parent_seal": state.parent_seal,
        "frozen": frozen,
        "unchanged": (
            [part for part in compared if not any(name.startswith(ATTRIBUTES[part]) for name in changed)]
            if compared == frozen
            else None
        ),
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
    """The record of a stage; empty where there is none that can be read, as in folders that are older than it."""
    try:
        found = json.loads((stage / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def changed_tensors(
    model: NemotronVL, parts: list[str], checkpoint: Path, between: Callable[[], None] = lambda: None
) -> list[str]:
    """Names of this rank's tensors that are not bitwise those of a checkpoint, in the model's formats.

    Args:
        model: On any layout. Of equal copies on several ranks one is compared: the replicas' own checks tell the rest.
        parts: Parts to look at.
        checkpoint: Whose; verified.
        between: Called before every gigabyte.
    """
    prefixes = tuple(f"{ATTRIBUTES[part]}." for part in parts)
    whole = {
        name: entry
        for name, entry in model.sharded_state_dict().items()
        if name.startswith(prefixes) and is_main_replica(entry.replica_id)
    }
    changed = []
    for some in _batches(whole):
        between()
        empty = {name: replace(entry, data=torch.empty_like(entry.data)) for name, entry in some.items()}
        read = sealed.read_sharded({"model": empty}, checkpoint / sealed.SHARDED)["model"]
        changed += [name for name, entry in some.items() if not torch.equal(read[name], entry.data)]
    return changed


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


def _is_sound(parent: Path) -> bool:
    """Collective: all ranks share the reading and get the same answer."""
    try:
        sealed.verify_together(parent)
    except (sealed.DamagedError, OSError) as error:
        log.warning("frozen parts are not compared with %s: %s", parent, error)
        return False
    return True
