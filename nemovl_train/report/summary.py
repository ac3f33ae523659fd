"""The few numbers that stand for a stage, and for a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from nemovl_train.report.collect import DONE, PENDING, RUNNING, Run, Stage
from nemovl_train.report.formats import number

# A single step's loss depends on its packs; the mean of some steps says where a stage stands.
LOSS_STEPS = 10


@dataclass(frozen=True)
class StageSummary:
    """Numbers of one stage; NaN where not known.

    Attributes:
        steps: Steps taken.
        planned: Steps the stage has by its config.
        seq_length: Tokens of a pack.
        trained: Parts with gradients.
        tokens: Tokens of real samples so far.
        first_loss: Mean over the first `LOSS_STEPS` steps.
        last_loss: Mean over the last ones.
        seconds: Time in steps, waiting for data included.
        remaining: Seconds to the last step at the speed so far; NaN unless the stage runs.
        throughput: Tokens a second over the whole stage.
        fill: Mean share of a pack's positions that hold tokens of samples.
        skipped: Steps that changed nothing.
    """

    steps: float
    planned: float
    seq_length: float
    trained: tuple[str, ...]
    tokens: float
    first_loss: float
    last_loss: float
    seconds: float
    remaining: float
    throughput: float
    fill: float
    skipped: int


@dataclass(frozen=True)
class RunSummary:
    """Numbers of a run: state, unix time of its first and latest sign of life, seconds in steps, tokens."""

    state: str
    started: float
    last_sign: float
    train_seconds: float
    tokens: float
    stages_done: int

    @property
    def wall_seconds(self) -> float:
        """Seconds from first to latest sign of life, evaluation and saving included."""
        return self.last_sign - self.started


def summarise_stage(stage: Stage) -> StageSummary:
    """Condense a stage's metrics."""
    losses = _finite(stage.column("loss"))
    parts = zip(stage.column("step_seconds"), stage.column("data_seconds"), strict=True)
    times = [fsum_finite(pair) for pair in parts]
    seconds, tokens = fsum_finite(times), fsum_finite(stage.column("tokens"))
    steps = max(_finite(stage.column("step")), default=0.0)
    planned = number(option(stage.config, "trainer.steps"))
    remaining = max(0.0, planned - steps) * median(times) if times and stage.state == RUNNING else math.nan
    trained = option(stage.config, "trainer.train")
    seen = _finite(stage.column("tokens_seen"))
    return StageSummary(
        steps=steps,
        planned=planned,
        seq_length=number(option(stage.config, "data.seq_length")),
        trained=tuple(str(part) for part in trained) if isinstance(trained, list) else (),
        tokens=seen[-1] if seen else (tokens if stage.rows else math.nan),
        first_loss=mean(losses[:LOSS_STEPS]),
        last_loss=mean(losses[-LOSS_STEPS:]),
        seconds=seconds if stage.rows else math.nan,
        remaining=remaining,
        throughput=tokens / seconds if seconds > 0 else math.nan,
        fill=mean(_finite(stage.column("fill"))),
        skipped=sum(row.get("applied") is False for row in stage.rows),
    )


def summarise_run(run: Run, summaries: Sequence[StageSummary]) -> RunSummary:
    """Condense a run.

    Args:
        run: The run.
        summaries: One per stage of it.
    """
    everything = [*run.parts, *run.stages]
    done = sum(stage.state == DONE for stage in run.stages)
    if run.stages and done == len(run.stages):
        state = DONE
    elif any(stage.state == RUNNING for stage in everything):
        state = RUNNING
    else:
        state = "between stages" if done or run.parts else PENDING
    return RunSummary(
        state=state,
        started=min(_finite([stage.started for stage in everything]), default=math.nan),
        last_sign=max(_finite([stage.last_sign for stage in everything]), default=math.nan),
        train_seconds=fsum_finite([summary.seconds for summary in summaries]),
        tokens=fsum_finite([summary.tokens for summary in summaries]),
        stages_done=done,
    )


def option(config: dict[str, Any], dotted: str) -> Any:
    """A config's value by its dotted key; None where it is missing."""
    found: Any = config
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return fmean(values) if values else math.nan


def fsum_finite(values: Sequence[float]) -> float:
    """Sum of the finite values."""
    return math.fsum(_finite(values))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
