"""What a step tells besides its loss: loss by source, model FLOPs and MFU, and which rank the others wait for.

Shape suffixes: L tokens of a pack on this context parallel rank, N documents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist

from data_pipelines.schema import Pack
from nemovl_train.config.schema import RunConfig
from nemovl_train.doctor.facts import node_name
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.flops import training_flops
from nemovl_train.parallel.agree import from_every_rank
from nemovl_train.parallel.layout import Layout
from nemovl_train.plan.hardware import GPU_TYPES
from nemovl_train.plan.trainable import adapted_parts


@dataclass(frozen=True)
class RankNumbers:
    """One number of every rank, in the order of ranks.

    Attributes:
        busy_seconds: Forward and backward, until the rank is ready to add gradients: the largest is the straggler's.
        data_seconds: Waiting for data.
        memory_bytes: Largest amount of device memory held by PyTorch so far; of the process without CUDA.
    """

    busy_seconds: list[float]
    data_seconds: list[float]
    memory_bytes: list[float]


@dataclass(frozen=True)
class StepNumbers:
    """What `metrics.jsonl` gets of a step besides its result.

    Attributes:
        model_flops: Of all packs: recomputation and padding left out, as in plans.
        mfu: Share of what the GPUs' data sheet allows; None without GPUs.
        source_loss: Mean cross entropy of a supervised token, by source.
        source_tokens: Supervised tokens, by source.
        ranks: Every `logging.every_steps` steps.
    """

    model_flops: float
    mfu: float | None
    source_loss: dict[str, float]
    source_tokens: dict[str, int]
    ranks: RankNumbers | None = None


@dataclass
class Telemetry:
    """Listens to the steps of one process. Making it and `collect` are collective.

    Attributes:
        config: The run.
        layout: Owner of the process groups.
        hosts: Name of every rank's node.
    """

    config: RunConfig
    layout: Layout
    hosts: list[str] = field(default_factory=list, init=False)
    _began: Any = None
    _done: Any = None
    _sums: torch.Tensor | None = field(default=None, repr=False)
    _adapted: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        # Once a run: it goes through all layers of the model, and is wanted for every pack.
        self._adapted = adapted_parts(self.config)
        self.hosts = from_every_rank(node_name())

    @property
    def sources(self) -> list[str]:
        """Names of the blend, the order of all tensors here."""
        return list(self.config.data.sources)

    def begin(self) -> None:
        """The packs of a step are about to run."""
        self._sums = torch.zeros(2, len(self.sources) + 1, dtype=torch.float64, device=self.layout.device)
        self._began, self._done = self._mark(), None

    def ready(self) -> None:
        """Gradients are about to be added up: until here a rank works alone, from here on it waits for the slowest."""
        self._done = self._mark()

    def saw(self, batch: PackBatch, token_loss_L: torch.Tensor) -> None:
        """A pack's losses are known on the device; nothing waits for them here."""
        if self._sums is None:
            return
        pack = batch.pack
        names = {name: number for number, name in enumerate(self.sources)}
        # The padding tail, and whatever a pack holds of no source of the blend, goes to the last place.
        of_document_N = torch.tensor([names.get(name, len(names)) for name in (*pack.dataset_ids, "")])
        held = self.layout.context_tokens(len(pack.input_ids))
        documents_L = pack.seq_idx[held.start : held.stop].long().clamp(max=len(of_document_N) - 1)
        source_L = of_document_N[documents_L].to(self.layout.device, non_blocking=True)
        supervised_L = batch.labels >= 0
        self._sums[0].index_add_(0, source_L, token_loss_L.detach().double() * supervised_L)
        self._sums[1].index_add_(0, source_L, supervised_L.double())

    def collect(self, packs: Sequence[Pack], *, step: int, seconds: float, data_seconds: float) -> StepNumbers:
        """Add the ranks' numbers up. Collective.

        Args:
            packs: This rank's packs of the step.
            step: Number of the step, counted from 1.
            seconds: Of the step, without waiting for data.
            data_seconds: Waiting for data.
        """
        assert self._sums is not None, "begin() comes first"
        # Context parallel ranks each have a part of the tokens, but all of them have the whole packs: one counts those.
        flops = sum(self.pack_flops(pack) for pack in packs) * (self.layout.cp_rank == 0)
        flat = torch.cat([self._sums.flatten(), torch.tensor([flops], dtype=torch.float64).to(self.layout.device)])
        dist.all_reduce(flat, group=self.layout.language_groups.dp_cp)
        *sums, total = flat.tolist()
        places = len(self.sources) + 1
        losses, counts = sums[:places], sums[places:]
        seen = [(name, losses[i], counts[i]) for i, name in enumerate(self.sources) if counts[i]]
        due = step % self.config.logging.every_steps == 0
        return StepNumbers(
            model_flops=total,
            mfu=self._mfu(total, seconds + data_seconds),
            source_loss={name: loss / count for name, loss, count in seen if math.isfinite(loss)},
            source_tokens={name: int(count) for name, _, count in seen},
            ranks=self._every_rank(data_seconds) if due else None,
        )

    def pack_flops(self, pack: Pack) -> float:
        """Useful model FLOPs of a pack, by the formulas of plans (`Plan.useful_flops_per_step`)."""
        lengths = pack.cu_seqlens.diff().tolist()[: len(pack.sample_keys)]
        return training_flops(
            self.config.model,
            document_lengths=lengths,
            num_tiles=pack.tiles.shape[0],
            head_tokens=int(pack.stats["supervised_tokens"]),
            train=self.config.trainer.train,
            adapted=self._adapted,
        ).total

    def _mfu(self, flops: float, seconds: float) -> float | None:
        if self.layout.device.type != "cuda":
            return None
        return flops / seconds / self.layout.world_size / GPU_TYPES[self.config.cluster.gpu].peak_flops

    def _every_rank(self, data_seconds: float) -> RankNumbers:
        mine = torch.tensor([self._busy_seconds(), data_seconds, self._memory_bytes()], dtype=torch.float64)
        mine = mine.to(self.layout.device)
        rows = [torch.empty_like(mine) for _ in range(self.layout.world_size)]
        dist.all_gather(rows, mine)
        busy, data, memory = torch.stack(rows).T.tolist()
        return RankNumbers(busy, data, memory)

    def _mark(self) -> Any:
        if self.layout.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _busy_seconds(self) -> float:
        if self._done is None:
            return 0.0
        if self.layout.device.type != "cuda":
            return float(self._done - self._began)
        self._done.synchronize()
        return float(self._began.elapsed_time(self._done)) / 1000

    def _memory_bytes(self) -> float:
        if self.layout.device.type == "cuda":
            return float(torch.cuda.max_memory_reserved(self.layout.device))
        return float(psutil.Process().memory_info().rss)
