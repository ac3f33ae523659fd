"""Which samples form pack number p: a pure function of (manifests, blend, seed). No media is opened here.

    order     each source runs through its split again and again, blocks and then samples in a keyed order
    blend     window k takes the stretch [k b, (k+1) b) of each source's order, b its share of a window's tokens
    pack      the samples of a window are packed on their lengths alone, into equally many packs in every window
    deal      packs are sorted by modelled cost and cut into steps; the steps of a window come in a keyed order

The position of a run is one number, the packs consumed. Every window has the same number of packs, so pack p is in
window p // packs and nothing before it is looked at. That asks for windows with equally many tokens, which is why
orders are measured in tokens and not in samples: a window differs from the next by a sample or two. How full the packs
of this blend can be is found once, by packing a few windows; should a later window still have more than its packs hold,
the samples that find no room sit out that epoch and are counted.
"""

import hashlib
import json
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction

import numpy as np

from data_pipelines.config import PACKING_MODES, CostConfig, DataConfig
from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import RenderRules
from data_pipelines.order import SourceOrder, keyed_order
from data_pipelines.sources import TOO_LONG, Draw, PlannedPack, PlanSource, Window, pack_window, plan_source
from data_pipelines.tokenizer import TextTokenizer

PLAN_VERSION = 3
_WINDOWS_HELD = 4
_PROBED_SAMPLES = 32768
_MOST_PROBES = 8
_MOST_TRIES = 8

logger = logging.getLogger(__name__)


class Plan:
    """The endless stream of packs of a run.

    Attributes:
        hash: SHA-256 over everything the stream depends on; a resumed run must have the same.
        sources: Sources with a share in the blend.
        shares: Share of each in the samples.
        rows: Samples of each that can fit a pack.
        window_packs: Packs of a window.
        budget: Tokens that a window draws (samples, where every sample has its own pack).
        dropped: Samples left out of the windows made so far, by reason; those that never fit are counted once.
        shrunk: Samples of those windows that fit only with fewer tiles or frames.
    """

    def __init__(
        self,
        sources: Sequence[PlanSource],
        *,
        seed: int,
        seq_length: int,
        packing: str,
        window_samples: int,
        step_packs: int = 1,
        mixed_blocks: int = 64,
        cost: CostConfig | None = None,
    ) -> None:
        """Check the blend, and find how much fits a window.

        Args:
            sources: The blend.
            seed: Seed of the order.
            seq_length: Tokens of a pack.
            packing: One of `PACKING_MODES`.
            window_samples: About how many samples are packed together.
            step_packs: Packs of an optimiser step, which are to cost alike.
            mixed_blocks: Blocks of a source that are mixed.
            cost: Model of a pack's cost.

        Raises:
            DataError: No source, an empty one, a bad weight, an unknown packing mode, or nothing that fits a pack.
        """
        _check_blend(sources, packing, seq_length, window_samples)
        self.seed, self.seq_length, self.packing, self.step_packs = seed, seq_length, packing, step_packs
        self.cost = cost or CostConfig()
        self._by_count = packing == "none"
        self.sources = [s for s in sources if (s.weight if s.epochs is None else s.epochs) > 0]
        sizes = [self._sizes(source) for source in self.sources]
        self.rows = [int(np.count_nonzero(size)) for size in sizes]
        self.dropped: Counter[str] = Counter()
        self._count_too_long()
        self._orders = [
            SourceOrder(size, key=f"{seed} {source.name}", block=source.block, mixed_blocks=mixed_blocks)
            for source, size in zip(self.sources, sizes, strict=True)
        ]
        self.shares = self._sample_shares()
        self._token_shares = self._shares_of_tokens()
        self.shrunk = 0
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._most_seen = -1
        settings = [PLAN_VERSION, seed, seq_length, packing, window_samples, step_packs, mixed_blocks]
        identity = [
            [s.name, str(share), len(s.lengths), s.block, s.identity]
            for s, share in zip(self.sources, self.shares, strict=True)
        ]
        text = json.dumps([settings, asdict(self.cost), identity])
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self.window_packs = self._packs_of_a_window(window_samples)
        self.budget = self._find_budget()

    def pack(self, number: int) -> PlannedPack:
        """Pack `number` of the stream, counted from 0."""
        window, place = divmod(number, self.window_packs)
        return PlannedPack(number, self.window(window).pack(place))

    def window(self, number: int) -> Window:
        """All packs of a window, from the cache of the last few or made anew."""
        if number not in self._windows:
            self._windows[number] = made = self._make_window(number)
            if number > self._most_seen:
                self._most_seen = number
                self.dropped += made.dropped
                self.shrunk += len(made.draw.fits)
                if made.dropped:
                    logger.warning(
                        "window %d of the data plan had no room for %d samples", number, made.dropped.total()
                    )
            if len(self._windows) > _WINDOWS_HELD:
                self._windows.popitem(last=False)
        self._windows.move_to_end(number)
        return self._windows[number]

    @property
    def pass_packs(self) -> float:
        """Packs until the slowest source has been through its split once, or through the epochs asked of it."""
        wanted = [1.0 if s.epochs is None else s.epochs for s in self.sources]
        tokens = (
            order.total * w / share for order, w, share in zip(self._orders, wanted, self._token_shares, strict=True)
        )
        return float(max(tokens)) / self.budget * self.window_packs

    def _sizes(self, source: PlanSource) -> np.ndarray:
        sizes = source.sizes(self.seq_length)
        return (sizes > 0).astype(np.int32) if self._by_count else sizes

    def _count_too_long(self) -> None:
        lost = {s.name: len(s.lengths) - n for s, n in zip(self.sources, self.rows, strict=True) if n < len(s.lengths)}
        if lost:
            self.dropped[TOO_LONG] = sum(lost.values())
            names = ", ".join(f"{count} of {name}" for name, count in lost.items())
            logger.warning("longer than %d tokens even with the fewest tiles and frames: %s", self.seq_length, names)
        empty = [s.name for s, n in zip(self.sources, self.rows, strict=True) if not n]
        if empty:
            raise DataError(
                f"no sample of {', '.join(empty)} fits into {self.seq_length} tokens, even with the fewest tiles and "
                "frames; raise data.seq_length, or give the source the weight 0"
            )

    def _sample_shares(self) -> list[Fraction]:
        weights = [
            Fraction(str(s.weight)) if s.epochs is None else Fraction(str(s.epochs)) * rows
            for s, rows in zip(self.sources, self.rows, strict=True)
        ]
        return [weight / sum(weights) for weight in weights]

    def _mean_sizes(self) -> list[Fraction]:
        return [Fraction(order.total, rows) for order, rows in zip(self._orders, self.rows, strict=True)]

    def _mean_size(self) -> Fraction:
        return sum((share * mean for share, mean in zip(self.shares, self._mean_sizes(), strict=True)), Fraction())

    def _shares_of_tokens(self) -> list[Fraction]:
        tokens = [share * mean for share, mean in zip(self.shares, self._mean_sizes(), strict=True)]
        return [part / sum(tokens) for part in tokens]

    @property
    def _capacity(self) -> int:
        return 1 if self._by_count else self.seq_length

    def _packs_of_a_window(self, window_samples: int) -> int:
        """As many as the samples asked for fill, in whole steps; never more than one pass over all the data."""
        most = -(-sum(order.total for order in self._orders) // self._capacity)
        packs = min(max(int(window_samples * self._mean_size() / self._capacity), self.step_packs), most)
        return packs - packs % self.step_packs or packs

    def _find_budget(self) -> int:
        """The most tokens of which the first windows leave nothing over, less a margin for those after them."""
        room = self.window_packs * self._capacity
        everything = sum(order.total for order in self._orders)
        budget = min(room, everything)
        if self._by_count:
            return budget  # a window draws exactly as many samples as it has packs
        per_window = max(1, int(budget / self._mean_size()))
        probes = min(_MOST_PROBES, max(2, _PROBED_SAMPLES // per_window))
        for _ in range(_MOST_TRIES):
            over = max(self._left_over(self._packed(number, budget)) for number in range(probes))
            if not over:
                break
            # What is over is the small items at the end, and they are slow to go.
            budget = max(1, budget - max(over, budget // 2000))
        if len(self.sources) == 1 and budget == everything:
            return budget  # every window is the same samples
        margin = min(self._capacity // 2, budget // 50) + budget // 2000
        if self.packing != "bfd":
            # Best fit finds a place for the last small items. Elsewhere what is left varies from window to window, like
            # the sum of as many draws as there are packs.
            margin += math.isqrt(self.window_packs) * (budget // per_window)
        return max(1, budget - margin)

    def _packed(self, number: int, budget: int) -> Window:
        draw = self._draw(number, budget)
        return pack_window(draw, self.seq_length, self.packing, self.cost, self.window_packs)

    def _left_over(self, window: Window) -> int:
        placed = sum(len(items) for items in window.bins)
        if placed == len(window.draw.rows):
            return 0
        members = [i for items in window.bins for i in items]
        return int(window.draw.lengths.sum() - window.draw.lengths[members].sum())

    def _make_window(self, number: int) -> Window:
        window = self._packed(number, self.budget)
        order = self._deal(window.costs, number)
        window.bins = [window.bins[i] for i in order.tolist()]
        window.costs = window.costs[order]
        return window

    def _draw(self, number: int, budget: int) -> Draw:
        """The samples of a window, mixed."""
        bounds = self._begins(number * budget), self._begins((number + 1) * budget)
        chosen = [order.rows(*stretch) for order, *stretch in zip(self._orders, *bounds, strict=True)]
        return Draw.of(self.sources, chosen, self._shuffle(f"samples {number}", sum(map(len, chosen))))

    def _begins(self, drawn: int) -> list[int]:
        """Place in each source's order once the blend has drawn so much."""
        if self._by_count:
            return apportion(drawn, self._token_shares)
        return [share * drawn // 1 for share in self._token_shares]

    def _deal(self, costs: np.ndarray, number: int) -> np.ndarray:
        """Order of a window's packs: sorted by cost, cut into steps, steps and the packs of a step shuffled."""
        # Packs of equal cost must not come in the packer's order, which begins with the longest samples.
        ranked = np.lexsort((self._shuffle(f"ties {number}", len(costs)), costs))
        steps = -(-len(ranked) // self.step_packs)
        step_of = np.arange(len(ranked)) // self.step_packs
        place = self._shuffle(f"steps {number}", steps)
        mixed = self._shuffle(f"packs {number}", len(ranked))
        # A last step that is not whole stays last, or it would shift all that follow.
        whole = np.arange(steps) * self.step_packs + self.step_packs <= len(ranked)
        return ranked[np.lexsort((mixed, place[step_of], ~whole[step_of]))]

    def _shuffle(self, purpose: str, size: int) -> np.ndarray:
        return keyed_order(size, f"{purpose} {self.seed}")


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to `shares`: Webster's method (Balinski and Young, 1982).

    Unlike rounding by largest remainder, no number falls as `total` rises, so that windows cut by it never overlap.

    Args:
        total: 0 or more.
        shares: Above 0, of sum 1.
    """
    # Item c of a share comes at time (c + 1/2) / share. Before this time there are at most `total` items.
    time = max(Fraction(total) - Fraction(len(shares), 2), Fraction())
    counts = [math.floor(time * share + Fraction(1, 2)) for share in shares]
    while sum(counts) < total:
        counts[min(range(len(shares)), key=lambda i: (2 * counts[i] + 1) / shares[i])] += 1
    return counts


def rank_places(global_batch: int, dp_rank: int, dp_size: int) -> list[int | None]:
    """Places in a step of the packs that one data-parallel rank takes: every `dp_size`-th, from its own number on.

    Args:
        global_batch: Packs of the step.
        dp_rank: Data-parallel rank.
        dp_size: Data-parallel size.

    Returns:
        Equally many on every rank; None for a fill pack, where the batch does not divide.
    """
    each = -(-global_batch // dp_size)
    places = (dp_rank + i * dp_size for i in range(each))
    return [place if place < global_batch else None for place in places]


def _check_blend(sources: Sequence[PlanSource], packing: str, seq_length: int, window_samples: int) -> None:
    if packing not in PACKING_MODES:
        raise DataError(f"data.packing {packing!r} is not one of {', '.join(PACKING_MODES)}")
    if seq_length < 1 or window_samples < 1:
        raise DataError(f"data.seq_length ({seq_length}) and data.window_samples ({window_samples}) must be at least 1")
    for source in sources:
        for key, value in (("weight", source.weight), ("epochs", source.epochs)):
            if value is not None and not 0 <= value < float("inf"):
                raise DataError(f"data.sources.{source.name}.{key} is {value}; it must be 0 or more")
        if not len(source.lengths):
            raise DataError(f"data.sources.{source.name} has no samples")
    if len({source.epochs is None for source in sources}) > 1:
        raise DataError("data.sources: some have epochs, some a weight; give all of them epochs, or none")
    if not any((source.weight if source.epochs is None else source.epochs) > 0 for source in sources):
        raise DataError("data.sources is empty or has no weight above 0; name at least one dataset")


def build_plan(
    config: DataConfig,
    datasets: Mapping[str, Dataset],
    rules: RenderRules,
    tokenizer: TextTokenizer,
    *,
    seed: int,
    step_packs: int,
) -> Plan:
    """The plan of a run over its opened sources.

    Raises:
        DataError: As `Plan`.
    """
    sources = [
        plan_source(name, datasets[name], rules, tokenizer, source, config.shuffle.block_mib)
        for name, source in config.sources.items()
    ]
    return Plan(
        sources,
        seed=seed,
        seq_length=config.seq_length,
        packing=config.packing,
        window_samples=config.window_samples,
        step_packs=step_packs,
        mixed_blocks=config.shuffle.blocks,
        cost=config.cost,
    )
