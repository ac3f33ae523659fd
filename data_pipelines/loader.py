"""The stream of packs of one data-parallel rank, and the finite pass over held-out data.

Every rank plans alone and alike; workers only build what they are told. So neither the number of ranks nor of workers
is part of a run's state: `packs_consumed` is.
"""

import os
import signal
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Self

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import RenderRules
from data_pipelines.pack import BadSample, BuiltPack, PackBuilder
from data_pipelines.plan import Plan, build_plan, rank_places
from data_pipelines.schema import Pack
from data_pipelines.sources import PlannedPack, plan_pass, plan_source
from data_pipelines.tokenizer import TextTokenizer

FILL_INDEX = -1
_FILL = PlannedPack(FILL_INDEX, ())


@dataclass
class QuarantineWatch:
    """Stops a run whose data are bad, not merely blemished.

    Attributes:
        in_a_row: More bad samples than this without a good one between stop the run.
        share: So does a larger share of bad samples than this,
        after: once this many samples were seen.
    """

    in_a_row: int = 100
    share: float = 0.01
    after: int = 1000
    seen: int = 0
    bad: int = 0
    streak: int = 0

    def record(self, outcomes: tuple[BadSample | None, ...]) -> None:
        """Count the samples of a pack.

        Raises:
            DataError: The limit is passed; the last bad sample is named.
        """
        for outcome in outcomes:
            self.seen += 1
            self.streak = self.streak + 1 if outcome else 0
            self.bad += outcome is not None
            too_many = self.seen > self.after and self.bad > self.share * self.seen
            if outcome and (self.streak > self.in_a_row or too_many):
                raise DataError(
                    f"too many unusable samples: {self.bad} of {self.seen}, {self.streak} in a row; the last is "
                    f"{outcome.key!r} of {outcome.dataset_id} ({outcome.reason}: {outcome.message}). Repair or replace "
                    "the dataset; every sample left out is named in the log"
                )


@dataclass(frozen=True)
class Opened:
    """What packs are made from: rules and tokenizer of a run, and its datasets by source name."""

    rules: RenderRules
    tokenizer: TextTokenizer
    datasets: dict[str, Dataset]


def open_sources(config: DataConfig, tokens_per_tile: int, split: str | None = None) -> Opened:
    """Open every source of a config; `split` takes the place of each source's own.

    Raises:
        DataError: A source that cannot be used as it is, or another number of tokens a tile than the model's.
    """
    rules = RenderRules.from_config(config)
    if rules.tokens_per_tile != tokens_per_tile:
        raise DataError(
            f"data.tile_size {config.tile_size} gives {rules.tokens_per_tile} tokens a tile, the model has "
            f"{tokens_per_tile}; set data.tile_size to the model's tile size"
        )
    tokenizer = TextTokenizer(config.tokenizer)
    datasets = {
        name: Dataset.open(source.path, split or source.split, rules=rules, tokenizer=tokenizer, read=config.read)
        for name, source in config.sources.items()
    }
    return Opened(rules, tokenizer, datasets)


def plan_of(config: DataConfig, opened: Opened, *, seed: int, global_batch: int) -> Plan:
    """The plan of a run over its opened sources."""
    return build_plan(config, opened.datasets, opened.rules, opened.tokenizer, seed=seed, step_packs=global_batch)


class _Buildable(TorchDataset[BuiltPack]):
    """What a worker process holds: `dataset[planned]` builds a pack."""

    def __init__(self, config: DataConfig, opened: Opened) -> None:
        self.config, self.rules, self.datasets = config, opened.rules, opened.datasets
        self._builder: PackBuilder | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_builder": None}

    def __getitem__(self, planned: PlannedPack) -> BuiltPack:
        if self._builder is None:
            tokenizer = TextTokenizer(self.config.tokenizer)
            self._builder = PackBuilder(self.config, self.datasets, self.rules, tokenizer)
        return self._builder.build(planned)


def _start_worker(worker_id: int) -> None:
    del worker_id
    torch.set_num_threads(1)
    # A scheduler signals the whole process group; the trainer decides what to do, workers leave when it does.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Threads of the native libraries can abort a process while it is torn down, and the trainer would see a dead
    # worker. Results are flushed by finalisers of higher priority, so nothing is lost by leaving at once.
    Finalize(None, _leave, exitpriority=-100)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _as_is(item: Any) -> Any:
    return item


class PackStream:
    """Endless iterator over optimiser steps: each `next()` gives this rank's packs of one step.

    Rank r of D gets packs c + r, c + r + D, ... of the step's [c, c + global_batch). Where D does not divide the global
    batch, ranks that come up short get fill packs (index -1, all padding, no weight), so that every rank has as many.

    Attributes:
        packs_consumed: Packs of the stream handed out over all ranks, fill packs not counted. The whole state.
        plan_hash: Equal hashes mean equal streams.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokens_per_tile: int,
        seed: int,
        global_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_pack: int = 0,
    ) -> None:
        """Open the sources and plan; no media is read before the first `next()`.

        Args:
            config: Blend, packing and media rules.
            tokens_per_tile: What the model makes of a tile; must agree with `config.tile_size`.
            seed: Seed of the order.
            global_batch: Packs of one optimiser step over all ranks.
            dp_rank: Data-parallel rank.
            dp_size: Data-parallel size.
            start_pack: `packs_consumed` of the run to continue.

        Raises:
            DataError: A source that cannot be used as it is.
        """
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        assert min(global_batch - 1, start_pack) >= 0, (global_batch, start_pack)
        self.global_batch, self.dp_rank, self.dp_size = global_batch, dp_rank, dp_size
        self.packs_consumed = start_pack
        opened = open_sources(config, tokens_per_tile)
        self.plan = plan_of(config, opened, seed=seed, global_batch=global_batch)
        self.plan_hash = self.plan.hash
        self._watch = QuarantineWatch()
        self._datasets = opened.datasets
        self._workers: list[BaseProcess] = []
        self._built = self._build_all(_Buildable(config, opened), config.num_workers)

    def _build_all(self, buildable: _Buildable, num_workers: int) -> Iterator[BuiltPack]:
        planned = _PlannedPacks(self)
        if num_workers == 0:
            return map(buildable.__getitem__, planned)
        loader = DataLoader(
            buildable,
            sampler=planned,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=buildable.config.read.prefetch,
            # Copies to a device from page-locked memory run beside its work.
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="spawn",
            worker_init_fn=_start_worker,
            collate_fn=_as_is,
            # Without its own generator the loader draws a seed from the global one and shifts the trainer's stream.
            generator=torch.Generator(),
        )
        others = set(active_children())
        built = iter(loader)
        self._workers = [process for process in active_children() if process not in others]
        return built

    def planned(self, step_start: int) -> list[PlannedPack]:
        """This rank's planned packs of the step that starts at a pack, fill packs included; reads no media."""
        places = rank_places(self.global_batch, self.dp_rank, self.dp_size)
        return [_FILL if place is None else self.plan.pack(step_start + place) for place in places]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Pack]:
        each = -(-self.global_batch // self.dp_size)
        packs = []
        for _ in range(each):
            built = next(self._built)
            self._watch.record(built.outcomes)
            packs.append(built.pack)
        self.packs_consumed += self.global_batch
        return packs

    def close(self) -> None:
        """Stop the workers and close the files; the stream gives nothing after this."""
        self._built = iter(())
        for worker in self._workers:
            worker.kill()  # one that was too busy to leave; it ignores milder signals
            worker.join()
        self._workers = []
        for dataset in self._datasets.values():
            dataset.close()


class _PlannedPacks:
    """The planned packs of a stream from its start on, as the sampler that feeds the workers."""

    def __init__(self, stream: PackStream) -> None:
        self._stream = stream
        self._start = stream.packs_consumed

    def __iter__(self) -> Iterator[PlannedPack]:
        start = self._start
        while True:
            yield from self._stream.planned(start)
            start += self._stream.global_batch


def heldout_packs(
    config: DataConfig,
    source: str | None = None,
    *,
    tokens_per_tile: int,
    split: str,
    max_samples: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Generator[Pack]:
    """One pass over a split, in manifest order, the same every time.

    Args:
        config: As for training; a source's own `split`, `weight` and `max_samples` are not used.
        source: Name of one source, or None for all, one after the other.
        tokens_per_tile: What the model makes of a tile.
        split: Split to read.
        max_samples: Only the first samples of each source.
        dp_rank: Data-parallel rank: it gets every dp_size-th pack.
        dp_size: Data-parallel size. All ranks get equally many packs, with fill packs at the end where needed.

    Raises:
        DataError: Unknown source or split, or as `PackStream`.
    """
    if source is not None and source not in config.sources:
        raise DataError(f"no source {source!r} in data.sources; it has {', '.join(config.sources)}")
    names = list(config.sources) if source is None else [source]
    chosen = {name: config.sources[name] for name in names}
    opened = open_sources(replace(config, sources=chosen), tokens_per_tile, split)
    builder = PackBuilder(config, opened.datasets, opened.rules, opened.tokenizer)
    watch = QuarantineWatch()
    number = 0
    try:
        for planned in _heldout_plan(config, opened, max_samples):
            if number % dp_size == dp_rank:
                built = builder.build(PlannedPack(number, planned.samples))
                watch.record(built.outcomes)
                yield built.pack
            number += 1
        if 0 < number % dp_size <= dp_rank:
            yield builder.build(_FILL).pack
    finally:
        for dataset in opened.datasets.values():
            dataset.close()


def _heldout_plan(config: DataConfig, opened: Opened, max_samples: int | None) -> Iterator[PlannedPack]:
    for name, dataset in opened.datasets.items():
        whole = SourceConfig(path=dataset.folder, max_samples=max_samples)
        source = plan_source(name, dataset, opened.rules, opened.tokenizer, whole, config.shuffle.block_mib)
        yield from plan_pass(
            source, seq_length=config.seq_length, packing=config.packing, window_samples=config.window_samples
        )
