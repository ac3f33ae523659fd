"""A schedule on paper: every step of every stage with its real data plan, state and learning rate, and no tensor.

What runs here is what a run uses: `data_pipelines.plan.Plan` on lengths, `rank_places` for the packs of each rank,
`TrainState` through its JSON for what a restart knows, `learning_rate`, and the planner's seconds for a step and a
checkpoint. Invented are the samples' lengths (lognormal about `workload.sample_tokens`, for datasets that need not be
there) and the weather: nodes that fail and jobs that reach their time limit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.fit import Fit
from data_pipelines.plan import Plan, rank_places
from data_pipelines.sources import NO_ROOM, PlanSource
from nemovl_train.config.schema import RunConfig
from nemovl_train.plan.planner import make_plan
from nemovl_train.training.lr import learning_rate
from nemovl_train.training.state import TrainState

log = logging.getLogger(__name__)

LENGTH_SPREAD = 0.7
"""Standard deviation of the logarithm of a sample's tokens."""
SHORTEST = 32
CHECKED_RESTARTS = 3
"""Restarts of a stage that make their plan anew and compare it; each costs seconds at full size."""


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What interrupts a run.

    Attributes:
        node_mtbf_hours: Mean time between failures of one node; 0 for none. The default is what Llama 3 saw: 419
            unexpected interruptions in 54 days of 16,384 GPUs (arXiv 2407.21783, section 3.3.4), for 8 GPUs.
        time_limit_hours: Of one job; 0 for none.
        lead_seconds: Before the limit, when the run is asked to save.
        queue_hours: From a requeue to the next start.
        start_minutes: From a start to its first step.
        seed: Of the failures.
    """

    node_mtbf_hours: float = 6300.0
    time_limit_hours: float = 4.0
    lead_seconds: float = 900.0
    queue_hours: float = 0.1
    start_minutes: float = 8.0
    seed: int = 1234


@dataclass(kw_only=True)
class StageRecord:
    """What happened to one stage.

    Attributes:
        name: Folder of the stage.
        steps: Optimiser steps.
        packs: Packs that they took.
        ranks: Processes of the run.
        samples: Samples that were trained on.
        tokens: Their tokens.
        planned_tokens: What the planner expects.
        fill: Share of the packs' tokens that are samples' tokens.
        passes: Passes over the sources, the slowest first.
        no_room: Samples that sat out because their window was full.
        failures: Crashes.
        limits: Time limits that were reached.
        repeated_steps: Steps that a crash lost.
        ideal_hours: Of the steps alone.
        hours: From the first start to the last checkpoint, waiting included.
        problems: What did not add up.
    """

    name: str
    steps: int
    packs: int
    ranks: int
    samples: int = 0
    tokens: int = 0
    planned_tokens: int = 0
    fill: float = 0.0
    passes: float = 0.0
    no_room: int = 0
    failures: int = 0
    limits: int = 0
    repeated_steps: int = 0
    ideal_hours: float = 0.0
    hours: float = 0.0
    problems: list[str] = field(default_factory=list)


class Clock:
    """Wall time over all stages: when the next node fails, and when the job that runs now has to stop.

    Attributes:
        now: Seconds since the first job started.
    """

    def __init__(self, weather: Weather, nodes: int) -> None:
        self.weather = weather
        self._random = np.random.default_rng(weather.seed)
        self._mean = weather.node_mtbf_hours * 3600 / nodes if weather.node_mtbf_hours else math.inf
        self.now = 0.0
        self.failure = self._next_failure()
        self.start()

    def start(self) -> None:
        """A job starts now: its limit counts from here, its first step comes later."""
        weather = self.weather
        limit = weather.time_limit_hours * 3600 - weather.lead_seconds if weather.time_limit_hours else math.inf
        self.stop = self.now + limit
        self.now += weather.start_minutes * 60

    def requeue(self) -> None:
        """The job ended; another starts after its wait."""
        self.now += self.weather.queue_hours * 3600
        self.start()

    def passes(self, seconds: float) -> bool:
        """Let time go by; False when a node fails meanwhile, at the moment when it does."""
        if self.failure <= self.now + seconds:
            self.now = max(self.now, self.failure)
            self.failure = self._next_failure()
            return False
        self.now += seconds
        return True

    def _next_failure(self) -> float:
        return self.now + (self._random.exponential(self._mean) if math.isfinite(self._mean) else math.inf)


def simulate(stages: Sequence[RunConfig], weather: Weather, *, scale: int = 1) -> list[StageRecord]:
    """Run a chain of stages on paper.

    Args:
        stages: Composed stages, in order.
        weather: What interrupts them.
        scale: Take one step in so many, over as many fewer samples.

    Returns:
        A record of each; `problems` is empty where everything added up.
    """
    clock = Clock(weather, max(make_plan(stage).grid.nodes for stage in stages))
    records = []
    for stage in stages:
        records.append(_Stage(_scaled(stage, scale), clock).run())
        log.info("%s: %d steps simulated", stage.run.stage, records[-1].steps)
    return records


def made_plan(config: RunConfig) -> Plan:
    """The data plan of a stage over invented samples, `workload.samples` of them shared out by the blend."""
    names = list(config.data.sources)
    weights = [source.weight if source.epochs is None else 1.0 for source in config.data.sources.values()]
    total = config.workload.samples or config.trainer.steps * config.trainer.global_batch
    sources = []
    for number, (name, weight) in enumerate(zip(names, weights, strict=True)):
        rows = max(1, round(total * weight / sum(weights)))
        lengths = _lengths(config, rows, number)
        sources.append(
            PlanSource(
                name=name,
                weight=weight,
                lengths=lengths,
                text_tokens=lengths,
                least=lengths,
                full=Fit(max_tiles=config.data.max_tiles, max_frames=config.data.max_frames, length=0),
                shrink=lambda row, limit: None,
                identity=f"simulated {rows}",
            )
        )
    return Plan(
        sources,
        seed=config.trainer.seed,
        seq_length=config.data.seq_length,
        packing=config.data.packing,
        window_samples=config.data.window_samples,
        step_packs=config.trainer.global_batch,
        mixed_blocks=config.data.shuffle.blocks,
        cost=config.data.cost,
    )


def _lengths(config: RunConfig, rows: int, number: int) -> np.ndarray:
    """[rows] int32: keyed, so that a restart invents the same samples."""
    random = np.random.default_rng([config.trainer.seed, number])
    drawn = np.exp(LENGTH_SPREAD * random.standard_normal(rows, dtype=np.float32))
    mean, longest = config.workload.sample_tokens, config.data.seq_length
    shortest = min(SHORTEST, longest)
    factor = mean / float(drawn.mean(dtype=np.float64))
    for _ in range(8):  # what is cut off at the pack's length is given back to the others
        cut_mean = float(np.clip(drawn * factor, shortest, longest).mean(dtype=np.float64))
        factor *= mean / cut_mean
    return np.clip(drawn * factor, shortest, longest).astype(np.int32)


def _scaled(config: RunConfig, scale: int) -> RunConfig:
    if scale == 1:
        return config
    samples = config.workload.samples
    return replace(
        config,
        trainer=replace(config.trainer, steps=max(1, config.trainer.steps // scale)),
        checkpoint=replace(config.checkpoint, every_steps=max(1, config.checkpoint.every_steps // scale)),
        workload=replace(config.workload, samples=max(1, samples // scale) if samples else None),
    )


def restore(saved: dict[str, Any]) -> TrainState:
    """What a restart knows: the state that the checkpoint holds."""
    return TrainState.from_json(saved, Path("state.json"))


class _Stage:
    """One stage: its state, what each pack was taken for, and which samples were drawn."""

    def __init__(self, config: RunConfig, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self.planned = make_plan(config)
        self.plan = made_plan(config)
        self.batch, self.steps = config.trainer.global_batch, config.trainer.steps
        grid = self.planned.grid
        places = np.array(
            [[-1 if p is None else p for p in rank_places(self.batch, rank, grid.dp)] for rank in range(grid.dp)]
        )
        self.places = places[places >= 0]
        packs = self.steps * self.batch
        self.taken = np.zeros(packs, dtype=np.int16)
        self.rates = np.full(self.steps, np.nan)
        self.tokens = np.full(packs, -1, dtype=np.int64)
        self.samples = np.zeros(packs, dtype=np.int32)
        self.drawn = [np.zeros(len(source.lengths), dtype=np.uint8) for source in self.plan.sources]
        self.record = StageRecord(name=config.run.stage, steps=self.steps, packs=packs, ranks=grid.gpus)
        self.windows = 0
        self.state = TrainState(seed=config.trainer.seed, plan_hash=self.plan.hash)
        self.saved = self.state.to_json()

    def run(self) -> StageRecord:
        """Take every step, come what may."""
        began, second = self.clock.now, self.planned.time.total
        while self.state.step < self.steps:
            if not self.clock.passes(second):
                self._crash()
                continue
            self._step()
            stopping = self.clock.now >= self.clock.stop and self.state.step < self.steps
            due = self.state.step % self.config.checkpoint.every_steps == 0 or self.state.step == self.steps
            if not (due or stopping):
                continue
            if not self.clock.passes(self.planned.checkpoint_seconds):
                self._crash()  # the folder was never published
                continue
            self.saved = self.state.to_json()
            if stopping:
                self.record.limits += 1
                self._restart()
        self.record.hours = (self.clock.now - began) / 3600
        self.record.ideal_hours = self.steps * second / 3600
        return self._checked()

    def _step(self) -> None:
        state = self.state
        packs = state.packs_consumed + self.places
        self._look(int(packs.max()))
        inside = packs[(packs >= 0) & (packs < len(self.taken))]
        if len(inside) < len(packs):
            self._problem(f"step {state.step} takes packs that the run does not have")
        np.add.at(self.taken, inside, 1)
        rate = learning_rate(self.config.optim, state.step, self.steps)
        if not math.isnan(self.rates[state.step]) and self.rates[state.step] != rate:
            self._problem(f"step {state.step} was repeated with another learning rate")
        self.rates[state.step] = rate
        state.step += 1
        state.packs_consumed += self.batch
        state.tokens_seen += int(self.tokens[inside].sum())

    def _look(self, pack: int) -> None:
        """Make the windows up to a pack, in order, and count whom they draw."""
        while self.windows * self.plan.window_packs <= pack:
            window = self.plan.window(self.windows)
            first = self.windows * self.plan.window_packs
            for place, members in enumerate(window.bins[: max(len(self.tokens) - first, 0)]):
                self.tokens[first + place] = window.draw.lengths[members].sum() if members else 0
                self.samples[first + place] = len(members)
            for number, drawn in enumerate(self.drawn):
                np.add.at(drawn, window.draw.rows[window.draw.owners == number], 1)
            self.windows += 1

    def _crash(self) -> None:
        self.record.failures += 1
        self.record.repeated_steps += self.state.step - self.saved["step"]
        # What those steps did is undone with them.
        self.taken[self.saved["packs_consumed"] : self.state.packs_consumed] -= 1
        self._restart()

    def _restart(self) -> None:
        self.clock.requeue()
        self.state = restore(self.saved)
        if self.record.failures + self.record.limits <= CHECKED_RESTARTS and self.state.step < self.steps:
            self._compare_plans()

    def _compare_plans(self) -> None:
        """A plan that another process makes must have the same packs where this one goes on."""
        fresh = made_plan(self.config)
        pack = self.state.packs_consumed
        if fresh.hash != self.state.plan_hash:
            self._problem("a restart has another plan")
        for number in range(pack, min(pack + self.batch, len(self.taken))):
            if self.plan.pack(number) != fresh.pack(number):
                self._problem(f"a restart has other samples in pack {number}")
                return

    def _checked(self) -> StageRecord:
        record, plan = self.record, self.plan
        wrong = np.flatnonzero(self.taken != 1)
        if len(wrong):
            self._problem(f"{len(wrong)} packs were not taken exactly once, the first is {wrong[0]}")
        for source, drawn in zip(plan.sources, self.drawn, strict=True):
            if int(drawn.max()) - int(drawn.min()) > 1:
                self._problem(f"{source.name}: a sample was drawn again before all others were drawn once")
        if np.isnan(self.rates).any():
            self._problem("a step had no learning rate")
        record.samples, record.tokens = int(self.samples.sum()), int(self.tokens.sum())
        if self.state.tokens_seen != record.tokens:
            self._problem(f"the state counts {self.state.tokens_seen} tokens, the packs hold {record.tokens}")
        record.planned_tokens = self.steps * self.planned.useful_tokens_per_step
        record.fill = record.tokens / (record.packs * self.config.data.seq_length)
        record.passes = record.packs / plan.pass_packs
        record.no_room = plan.dropped[NO_ROOM]
        return record

    def _problem(self, text: str) -> None:
        if text not in self.record.problems:
            self.record.problems.append(text)
