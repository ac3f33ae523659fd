"""Held-out loss while a stage trains: measured at an interval, the best weights kept, and an end when it rises.

What is decided here follows from numbers in `TrainState` alone, so a run that is resumed decides as one that never
stopped. The weights of the best step are a checkpoint without optimizer state under `STAGE/best`, for an export or
another run's `trainer.init_from`.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.checkpoint import saving, sealed
from nemovl_train.checkpoint.files import explain_disk_errors, replace_text
from nemovl_train.checkpoint.retention import Keep
from nemovl_train.evaluation.run import Score, evaluation_data, score_source
from nemovl_train.parallel.agree import on_first_rank
from nemovl_train.training.callbacks.metrics import truncate_after

if TYPE_CHECKING:
    from nemovl_train.model.vlm import NemotronVL
    from nemovl_train.training.state import TrainState
    from nemovl_train.training.trainer import Trainer

log = logging.getLogger(__name__)

FILE = "validation.jsonl"
BEST = "best"
STOPPED = "stopped_early.json"


class Validation:
    """The held-out loss of a run, as `config.evaluation` asks for it; without an interval it does nothing.

    Args:
        trainer: The run, restored.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.options, self.folder = trainer.config.evaluation, trainer.folder.path
        on_first_rank(lambda: self._rewind(trainer.state.step))

    def _rewind(self, step: int) -> None:
        """Forget what a run that is continued from this step had found after it."""
        truncate_after(self.folder / FILE, step)
        best = self.folder / BEST
        sealed.clean(best)
        sealed.discard([path for path in sealed.published(best) if path > sealed.step_folder(best, step)])

    def after_step(self, trainer: Trainer) -> None:
        """Measure if it is time to, before the step is saved. Collective."""
        step, every = trainer.state.step, self.options.every_steps
        if not every or step % every:
            return
        with trainer.engine.whole_model() as model:
            scores = _scores(trainer, model)
        # One rank decides for all: what follows is collective.
        loss = on_first_rank(lambda: mean_loss(scores))
        improved = loss < trainer.state.best_loss
        if improved:
            trainer.state.best_loss, trainer.state.best_step, trainer.state.stale_validations = loss, step, 0
        else:
            trainer.state.stale_validations += 1
        best, best_step = trainer.state.best_loss, trainer.state.best_step
        losses = {name: score.row()["loss"] for name, score in scores.items()}
        row = {"step": step, "loss": _finite(loss), "best_step": best_step, "sources": losses}
        on_first_rank(lambda: self._write(row))
        log.info("step %d: held-out loss %.4f, best %.4f at step %d", step, loss, best, best_step)
        if improved and self.options.keep_best:
            self._save(trainer)

    def exhausted(self, state: TrainState) -> bool:
        """Whether the loss has not improved for so many measurements that the run ends."""
        return 0 < self.options.patience <= state.stale_validations

    def note_end(self, state: TrainState) -> None:
        """Say where a run ended before its last step: its folder is done from then on. Collective."""
        found = {"step": state.step, "best_step": state.best_step, "best_loss": _finite(state.best_loss)}
        on_first_rank(lambda: replace_text(self.folder / STOPPED, json.dumps(found)))

    def _save(self, trainer: Trainer) -> None:
        root = self.folder / BEST
        state = trainer.state.to_json()
        run_id = trainer.folder.run_id
        saving.save(
            root,
            trainer.state.step,
            model=trainer.engine.weights,
            optimizer=None,
            state=state,
            run_id=run_id,
            keep=Keep(last=1),
        )

    def _write(self, row: dict[str, Any]) -> None:
        with explain_disk_errors(self.folder), (self.folder / FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")


def mean_loss(scores: dict[str, Score]) -> float:
    """Mean of the sets' losses, each set counting alike; infinite where nothing could be scored or is not a number."""
    losses = [score.nats / score.tokens for score in scores.values() if score.tokens]
    mean = sum(losses) / len(losses) if losses else math.inf
    return mean if math.isfinite(mean) else math.inf


def stopped_at(folder: Path) -> int | None:
    """Step at which a stage ended early; None where it did not."""
    path = folder / STOPPED
    return int(json.loads(path.read_text())["step"]) if path.is_file() else None


def _scores(trainer: Trainer, model: NemotronVL) -> dict[str, Score]:
    data = evaluation_data(trainer.config)
    tokenizer = TextTokenizer(data.tokenizer)
    model.eval()
    try:
        return {
            name: score_source(model, data, name, trainer.config, trainer.layout, tokenizer) for name in data.sources
        }
    finally:
        model.train()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
