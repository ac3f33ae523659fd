"""Held-out loss while a stage trains: measured at an interval, the best weights kept, and an end when it rises.

What is decided here follows from numbers in `TrainState` alone, so a run that is resumed decides as one that never
stopped; a measurement that a stop request cut off is made when the run goes on. The weights of the best step are a
checkpoint without optimizer state under `STAGE/best`, for an export or another run's `trainer.init_from`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

from data_pipelines.tokenizer import TextTokenizer
from nemovl_train.checkpoint import saving, sealed
from nemovl_train.checkpoint.files import explain_disk_errors
from nemovl_train.checkpoint.retention import Keep
from nemovl_train.config.schema import RunConfig
from nemovl_train.evaluation.run import Score, StopAskedError, evaluation_data, score_source
from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.agree import on_first_rank
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.callbacks.metrics import truncate_after
from nemovl_train.training.engine import Engine
from nemovl_train.training.folder import StageFolder
from nemovl_train.training.state import TrainState

log = logging.getLogger(__name__)

FILE = "validation.jsonl"
BEST = "best"


class Validation:
    """The held-out loss of a run, as `config.evaluation` asks for it; without an interval it does nothing.

    Args:
        config: The stage's config.
        folder: The stage's folder, claimed.
        engine: What trains.
        layout: Owner of the process groups.
        interrupted: Asked on every rank before each pack, with one answer on all; True gives the measurement up.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: StageFolder,
        engine: Engine,
        layout: Layout,
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.options, self.stage = config, config.evaluation, folder
        self.engine, self.layout, self.interrupted = engine, layout, interrupted

    def rewind(self, step: int) -> None:
        """Forget what a run that is continued from this step had found after it. For the first rank."""
        truncate_after(self.stage.path / FILE, step)
        best = self.stage.path / BEST
        sealed.clean(best)
        sealed.discard([path for path in sealed.published(best) if path > sealed.step_folder(best, step)])

    def measure_if_due(self, state: TrainState) -> None:
        """Measure after a step, before it is saved, or where a stop request came between. Collective."""
        every = self.options.every_steps
        if not every or state.step % every or state.step <= state.measured_step:
            return
        try:
            with self.engine.whole_model() as model:
                scores = self._scores(model)
        except StopAskedError:
            return
        # One rank decides for all: what follows is collective.
        loss = on_first_rank(lambda: mean_loss(scores))
        improved = loss < state.best_loss
        if improved:
            state.best_loss, state.best_step, state.stale_validations = loss, state.step, 0
        else:
            state.stale_validations += 1
        state.measured_step = state.step
        losses = {name: score.row()["loss"] for name, score in scores.items()}
        row = {"step": state.step, "loss": _finite(loss), "best_step": state.best_step, "sources": losses}
        on_first_rank(lambda: self._write(row))
        log.info(
            "step %d: held-out loss %.4f, best %.4f at step %d", state.step, loss, state.best_loss, state.best_step
        )
        if improved and self.options.keep_best:
            self._save(state)

    def exhausted(self, state: TrainState) -> bool:
        """Whether the loss has not improved for so many measurements that the run ends."""
        return 0 < self.options.patience <= state.stale_validations

    def _scores(self, model: NemotronVL) -> dict[str, Score]:
        data = evaluation_data(self.config)
        tokenizer = TextTokenizer(data.tokenizer)
        model.eval()
        try:
            return {
                name: score_source(model, data, name, self.config, self.layout, tokenizer, self.interrupted)
                for name in data.sources
            }
        finally:
            model.train()

    def _save(self, state: TrainState) -> None:
        saving.save(
            self.stage.path / BEST,
            state.step,
            model=self.engine.weights,
            optimizer=None,
            state=state.to_json(),
            run_id=self.stage.run_id,
            keep=Keep(last=1),
        )

    def _write(self, row: dict[str, Any]) -> None:
        with explain_disk_errors(self.stage.path), (self.stage.path / FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")


def mean_loss(scores: dict[str, Score]) -> float:
    """Mean of the sets' losses, each set counting alike; infinite where nothing could be scored or is not a number."""
    losses = [score.nats / score.tokens for score in scores.values() if score.tokens]
    mean = sum(losses) / len(losses) if losses else math.inf
    return mean if math.isfinite(mean) else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
