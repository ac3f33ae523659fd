"""Saves that go on behind the training: plan and copy at once, then write, publish, verify and delete.

    start      collective: plan the files, check the disk, copy this rank's part to host memory if training goes on
    writing    a thread a rank: write and hash its file
    publish    collective, milliseconds: index, seal, rename
    checking   a thread a rank: read its file back against its hash
    retention  collective, then a thread of rank 0: delete what is no longer kept

Collectives stay on the main thread. The trainer asks `busy` at every step, all ranks agree, and `advance` takes them
to the next stage together.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.files import HashedFile, explain_disk_errors, no_space
from nemovl_train.checkpoint.retention import Keep, superseded
from nemovl_train.checkpoint.sealed import SHARDED, WORK, ShardedModel, ShardedOptimizer
from nemovl_train.checkpoint.storage import INDEX, HostStage, PlannedFile, join_index
from nemovl_train.exceptions import CheckpointError
from nemovl_train.parallel.agree import from_every_rank, on_first_rank

# isort: split
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

log = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 24  # index, state and what file systems need besides


@dataclass
class _Save:
    """One checkpoint on its way."""

    step: int
    work: Path
    final: Path
    plan: PlannedFile
    common: Any
    state: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    stage: str = "writing"
    entry: dict[str, Any] = field(default_factory=dict)


class Saver:
    """Writes checkpoints of one stage, one at a time. Every rank has one, and calls the collectives together.

    Args:
        root: The stage's `checkpoints` folder.
        run_id: Identity of the run, checked on load.
        keep: Which checkpoints stay.
        in_background: Copy this rank's part to host memory, so that weights and optimizer may change while it is
            written. Without it the caller calls `finish` before anything changes, and no such memory is needed.

    Attributes:
        seconds: How long the last save took from `start` until it was published; None before the first.
    """

    def __init__(self, root: Path, run_id: str, keep: Keep | None = None, *, in_background: bool = True) -> None:
        self.root, self.run_id, self.keep, self.in_background = root, run_id, keep, in_background
        self.seconds: float | None = None
        self._stage = HostStage(pinned=torch.cuda.is_available())
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._planner = _Planner()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still works."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def stage_bytes(self) -> int:
        """Host memory that this rank keeps for its copies."""
        return self._stage.held_bytes

    @property
    def idle(self) -> bool:
        """Whether there is no save on its way, the same on every rank."""
        return self._save is None

    def start(
        self, step: int, *, model: ShardedModel, optimizer: ShardedOptimizer | None, state: dict[str, Any]
    ) -> None:
        """Begin a checkpoint; in the background, weights and optimizer may change as soon as this returns. Collective.

        Args:
            step: Optimiser steps done.
            model: Source of the weights.
            optimizer: Source of the optimizer state; None saves weights only.
            state: Contents of `state.json`.

        Raises:
            CheckpointError: The save before this one failed, the disk has too little space, or the folder cannot be
                written; earlier checkpoints are untouched.
        """
        self.finish()
        final = sealed.step_folder(self.root, step)
        work = self.root / f"{WORK}{final.name}"
        sharded: dict[str, Any] = {"model": model.sharded_state_dict()}
        if optimizer is not None:
            sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"])
        plan, common = self._planner.plan(sharded)
        needed = sum(from_every_rank(plan.bytes))
        on_first_rank(lambda: _prepare(work, needed))
        # Copies: some optimizers count their steps in a tensor that the next step changes.
        self._save = _Save(step, work, final, plan, deepcopy(common), state)
        if self.in_background:
            self._stage.fill(plan.tensors)
            plan.tensors = []
        self._run(self._write)

    def advance(self) -> Path | None:
        """Take the next step of the save on its way, waiting for this rank's thread. Collective.

        Returns:
            The folder, when it was just published.

        Raises:
            CheckpointError: A rank could not write or verify its file; earlier checkpoints are untouched.
        """
        assert self._save is not None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return {"writing": self._publish, "checking": self._retain, "deleting": self._done}[self._save.stage]()

    def finish(self) -> Path | None:
        """Wait until the save on its way is published, verified and has made room. Collective.

        Returns:
            The folder, if this published it.
        """
        folder = None
        while self._save is not None:
            folder = self.advance() or folder
        return folder

    def _publish(self) -> Path:
        save = self._current()
        results = from_every_rank((save.plan.entries, save.entry, self._take_failure()))
        try:
            on_first_rank(lambda: self._seal(results))
        except CheckpointError:
            if dist.get_rank() == 0:
                shutil.rmtree(save.work, ignore_errors=True)  # others need the space that half of it takes
            self._save = None
            raise
        self.seconds = time.monotonic() - save.began
        save.stage = "checking"
        self._run(self._check)
        return save.final

    def _seal(self, results: list[tuple[dict[str, Any], dict[str, Any], CheckpointError | None]]) -> None:
        save = self._current()
        for _, _, failure in results:
            if failure is not None:
                raise failure
        files = {f"{SHARDED}/{entry['file']}": _without_name(entry) for _, entry, _ in results}
        texts = {
            f"{SHARDED}/{INDEX}": join_index([entries for entries, _, _ in results], save.common),
            "state.json": json.dumps(save.state, indent=1, sort_keys=True),
        }
        identity = {"run_id": self.run_id, "step": save.step}
        sealed.seal(save.work, save.final, files=files, texts=texts, identity=identity)

    def _retain(self) -> None:
        save = self._current()
        failures = [failure for failure in from_every_rank(self._take_failure()) if failure is not None]
        if failures:
            self._save = None
            raise failures[0]
        save.stage = "deleting"
        if self.keep is not None and dist.get_rank() == 0:
            self._run(self._delete)

    def _done(self) -> None:
        self._save = None

    def _write(self) -> None:
        save = self._current()
        with explain_disk_errors(self.root):
            file = HashedFile(save.work / SHARDED / save.plan.file)
            try:
                stage, tensors = self._stage, save.plan.tensors
                for block in stage.blocks() if self.in_background else stage.through(tensors):
                    file.write(block)
            finally:
                save.plan.tensors = []
                save.entry = {"file": save.plan.file, **file.close()}

    def _check(self) -> None:
        save = self._current()
        sealed.check_file(save.final, f"{SHARDED}/{save.plan.file}", save.entry)

    def _delete(self) -> None:
        """Failures are told and forgotten: what could not be deleted costs space, nothing else."""
        assert self.keep is not None
        try:
            sealed.discard(superseded(self._current().final, self.keep))
        except OSError as error:
            log.warning("an old checkpoint could not be deleted (%s); the next save tries again", error)

    def _run(self, job: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                job()
            except BaseException as error:  # told by the next `advance`, on every rank
                self._failure = error

        self._thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def _take_failure(self) -> CheckpointError | None:
        failure, self._failure = self._failure, None
        if failure is None or isinstance(failure, CheckpointError):
            return failure
        if not isinstance(failure, Exception):
            raise failure
        return CheckpointError(
            f"rank {dist.get_rank()} could not write its part of {self._current().final}: earlier checkpoints are "
            f"intact; it said: {failure!r}"
        )

    def _current(self) -> _Save:
        assert self._save is not None
        return self._save


def save(
    root: Path,
    step: int,
    *,
    model: ShardedModel,
    optimizer: ShardedOptimizer | None,
    state: dict[str, Any],
    run_id: str,
    keep: Keep | None = None,
) -> Path:
    """Write, seal, publish and verify one checkpoint before going on. Collective.

    Returns:
        The published folder.

    Raises:
        CheckpointError: As `Saver.start` and `Saver.advance`.
    """
    saver = Saver(root, run_id, keep, in_background=False)
    saver.start(step, model=model, optimizer=optimizer, state=state)
    folder = saver.finish()
    assert folder is not None
    return folder


class _Planner:
    """Plans files with megatron-core. The ranks exchange and check their plans once, and again when one changes."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, ...]] | None = None
        self._plans: tuple[Any, Any] = (None, None)

    def plan(self, sharded: dict[str, Any]) -> tuple[PlannedFile, Any]:
        """What this rank writes, and what is the same on all ranks. Collective."""
        parts, common = save_preprocess(sharded, validate_access_integrity=False)
        flat, _, _ = strategy._replace_state_dict_keys_with_sharded_keys(parts, True)
        pieces = [_identity(item) for items in flat.values() for item in items]
        # With thousands of tensors and hundreds of ranks the exchange takes seconds, and nearly never changes.
        changed = any(from_every_rank(pieces != self._known))
        if changed:
            validate_sharding_integrity(determine_global_metadata(parts)[1], common_state_dict=common)
        plan = PlannedFile(dist.get_rank())
        planner = strategy.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        tensors = strategy.mcore_to_pyt_state_dict(flat, False)
        _, central, local, _, _ = save_state_dict_async_plan(
            tensors, plan, planner=planner, cached_ckpt_structure=None if changed else (*self._plans, True)
        )
        self._known, self._plans = pieces, (central, local)
        return plan, common


def _identity(item: Any) -> tuple[Any, ...]:
    """What of a sharded tensor or object its plan depends on."""
    place = (item.key, item.global_shape, item.global_offset)
    return (*place, item.local_shape, item.dtype) if isinstance(item, ShardedTensor) else place


def _prepare(work: Path, needed: int) -> None:
    with explain_disk_errors(work.parent):
        if work.exists():
            shutil.rmtree(work)
        (work / SHARDED).mkdir(parents=True)
        free = shutil.disk_usage(work).free
        if free < needed + _SPARE_BYTES:
            shutil.rmtree(work, ignore_errors=True)
            raise CheckpointError(f"{no_space(work.parent)} (a checkpoint takes {needed / 2**30:.2f} GiB)")


def _without_name(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "file"}
