"""What a run remembers besides weights and optimizer state: a few counters, as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nemovl_train.exceptions import CheckpointError

FORMAT_VERSION = 3


@dataclass
class TrainState:
    """Position of a run. Together with the config it determines everything that follows.

    Attributes:
        step: Optimiser steps done, skipped ones included; the learning rate is a function of it.
        packs_consumed: Packs taken from the plan over all ranks; the only state of the data side.
        tokens_seen: Tokens of real samples (padding not counted) so far.
        tokens_supervised: Tokens that carried loss so far.
        tokens_visual: Image tokens so far.
        best_loss: Lowest held-out loss that was measured while training; infinite before the first measurement.
        best_step: Step of that measurement.
        stale_validations: Measurements since then.
        measured_step: Step of the last measurement.
        bad_steps: Steps that changed nothing because loss or gradient norm was not finite, or a spike.
        recent_losses: Losses of the last steps that were taken; spikes are judged by them.
        recent_norms: Gradient norms of the same steps.
        seed: Seed of the run.
        plan_hash: Identity of the data order; a resumed run must reproduce it.
        config_hash: Identity of the options that decide the result.
        parent: Checkpoint whose weights the run started from.
        parent_seal: Hash that seals it. Checkpoints of adapters hold nothing of their base but this reference.
        adapter: The run's adapter options (`AdapterConfig`, as plain values); None where whole parts train.
    """

    step: int = 0
    packs_consumed: int = 0
    tokens_seen: int = 0
    tokens_supervised: int = 0
    tokens_visual: int = 0
    bad_steps: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    stale_validations: int = 0
    measured_step: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    seed: int = 0
    plan_hash: str = ""
    config_hash: str = ""
    parent: str | None = None
    parent_seal: str | None = None
    adapter: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The state as a JSON object with its format version."""
        # JSON has no infinity.
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"format_version": FORMAT_VERSION, **asdict(self), "best_loss": best}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: Path) -> TrainState:
        """Rebuild a state, refusing another format version or another set of fields.

        Args:
            data: Object written by `to_json`.
            where: File it came from, for the error message.
        """
        version = data.get("format_version")
        if version == 2 and "step" in data:
            # It did not say when the held-out loss was measured last, and had always done so when it was due.
            data, version = {**data, "measured_step": data["step"]}, FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{where}: state format {version}, this version reads {FORMAT_VERSION}")
        values = {key: value for key, value in data.items() if key != "format_version"}
        values.setdefault("adapter", None)  # said since checkpoints of adapters are compared with it
        expected = {f.name for f in fields(cls)}
        if set(values) != expected:
            raise CheckpointError(f"{where}: fields {sorted(set(values) ^ expected)} are missing or unknown")
        best = values.pop("best_loss")
        return cls(**values, best_loss=math.inf if best is None else best)


def read_state(folder: Path) -> TrainState:
    """The `TrainState` of a checkpoint folder, without touching its tensors."""
    path = folder / "state.json"
    return TrainState.from_json(json.loads(path.read_text()), path)
