"""Which samples form pack number p: a pure function of (manifests, blend, seed). No media is opened here.

    order     each source runs through its split again and again, in a keyed permutation per (seed, source, epoch)
    blend     window k takes floor(w (k+1) N) - floor(w k N) samples of a source with share w
    pack      the samples of a window are packed on their lengths alone; windows are independent
    shuffle   the packs of a window come in a keyed order

The position of a run is one number, the packs consumed. Finding the window of pack p needs the number of packs of the
windows before it, so these are counted once, in order, from lengths alone, and kept: about 20 ms for a window of 4096,
so a run that resumes after ten million samples starts some 40 s later. The packs themselves are made on demand and only
the last few windows are held.
"""

import bisect
import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_pipelines.config import PACKING_MODES, DataConfig
from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import MediaShape, RenderRules, lay_out, smaller_budgets
from data_pipelines.order import keyed_permutation
from data_pipelines.packing import pack_lengths
from data_pipelines.shards import Dataset
from data_pipelines.template import frame_label_tokens
from data_pipelines.tokenizer import TextTokenizer

PLAN_VERSION = 1
TOO_LONG = "longer_than_pack"
_WINDOWS_HELD = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a pack: where it is and under which budget it fits.

    Attributes:
        source: Name in the blend.
        row: Row of the source's manifest.
        max_tiles: Tile budget of each image.
        max_frames: Frame budget of each video.
        length: Tokens it has under that budget.
    """

    source: str
    row: int
    max_tiles: int
    max_frames: int
    length: int


@dataclass(frozen=True)
class PlannedPack:
    """Samples of one pack in document order; index -1 and no samples for a fill pack."""

    index: int
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Budget under which a sample fits, and its length then."""

    max_tiles: int
    max_frames: int
    length: int


@dataclass(frozen=True, kw_only=True)
class PlanSource:
    """What planning needs to know about one source.

    Attributes:
        name: Name in the blend: two names of one folder get different orders.
        weight: Share of the blend in samples, relative to the others.
        lengths: [rows] int64, tokens of each sample at the full budget.
        full: Fit of a sample that needs no reduction, its length left at 0.
        shrink: Maps (row, limit) to the largest Fit of at most `limit` tokens, or None.
        identity: Hash of the manifest.
    """

    name: str
    weight: float
    lengths: np.ndarray
    full: Fit
    shrink: Callable[[int, int], Fit | None]
    identity: str


@dataclass(kw_only=True)
class Window:
    """Packed samples of one window, and what became of those that did not fit.

    Kept as columns: counting packs is all that most windows are made for, and `PlannedSample`s cost more than packing.

    Attributes:
        sources: Source of each sample.
        rows: Its row.
        lengths: Its tokens, after reduction.
        fits: Budget of each sample that was reduced, by number.
        bins: Sample numbers of each pack, packs in the order of the stream.
        dropped: Samples left out, by reason.
    """

    sources: list[PlanSource]
    rows: list[int]
    lengths: list[int]
    fits: dict[int, Fit]
    bins: list[list[int]]
    dropped: Counter[str]

    def pack(self, number: int) -> tuple[PlannedSample, ...]:
        """Samples of one pack of the window."""
        return tuple(self._sample(i) for i in self.bins[number])

    @property
    def packs(self) -> list[tuple[PlannedSample, ...]]:
        """Samples of every pack."""
        return [self.pack(i) for i in range(len(self.bins))]

    def _sample(self, i: int) -> PlannedSample:
        source = self.sources[i]
        fit = self.fits.get(i, source.full)
        return PlannedSample(source.name, self.rows[i], fit.max_tiles, fit.max_frames, self.lengths[i])


class Plan:
    """The endless stream of packs of a run.

    Attributes:
        hash: SHA-256 over everything the stream depends on; a resumed run must have the same.
        dropped: Samples left out of the windows counted so far, by reason.
        shrunk: Samples of those windows that fit only with fewer tiles or frames.
    """

    def __init__(
        self, sources: Sequence[PlanSource], *, seed: int, seq_length: int, packing: str, window_samples: int
    ) -> None:
        """Check the blend; nothing is planned yet.

        Raises:
            DataError: No source, an empty one, a negative weight, or an unknown packing mode.
        """
        _check_blend(sources, packing, seq_length, window_samples)
        self.sources = [s for s in sources if s.weight > 0]
        self.seed, self.seq_length, self.packing = seed, seq_length, packing
        total = sum(Fraction(str(s.weight)) for s in self.sources)
        self.shares = [Fraction(str(s.weight)) / total for s in self.sources]
        # A window larger than the data would hold several epochs, and samples could meet themselves in a pack.
        self.window_samples = min(window_samples, sum(len(s.lengths) for s in self.sources))
        self._starts = [0]  # number of the first pack of each window counted so far, and of the next one
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._idle = 0
        self._warned = False
        self.dropped: Counter[str] = Counter()
        self.shrunk = 0
        identity = [
            [s.name, str(w), len(s.lengths), s.identity] for s, w in zip(self.sources, self.shares, strict=True)
        ]
        text = json.dumps([PLAN_VERSION, seed, seq_length, packing, self.window_samples, identity])
        self.hash = hashlib.sha256(text.encode()).hexdigest()

    def pack(self, number: int) -> PlannedPack:
        """Pack `number` of the stream, counted from 0.

        Raises:
            DataError: No sample of any source fits a pack.
        """
        while self._starts[-1] <= number:
            self._count_next()
        window = bisect.bisect_right(self._starts, number) - 1
        return PlannedPack(number, self.window(window).pack(number - self._starts[window]))

    def window(self, number: int) -> Window:
        """All packs of a window, from the cache of the last few or made anew."""
        if number not in self._windows:
            self._windows[number] = self._make_window(number)
            if len(self._windows) > _WINDOWS_HELD:
                self._windows.popitem(last=False)
        self._windows.move_to_end(number)
        return self._windows[number]

    def _count_next(self) -> None:
        number = len(self._starts) - 1
        window = self.window(number)
        packs = len(window.bins)
        self._starts.append(self._starts[-1] + packs)
        self.dropped += window.dropped
        self.shrunk += len(window.fits)
        if window.dropped:
            # Said aloud once: later windows leave out the same kinds of samples, and `dropped` counts them all.
            level = logging.DEBUG if self._warned else logging.WARNING
            self._warned = True
            reasons = ", ".join(f"{count} {reason}" for reason, count in window.dropped.items())
            total = sum(window.dropped.values())
            logger.log(level, "a window of %d samples leaves out %d: %s", self.window_samples, total, reasons)
        self._idle = 0 if packs else self._idle + self.window_samples
        # By then every source has been through an epoch, so nothing that fits can still come.
        sizes = (len(s.lengths) / share for s, share in zip(self.sources, self.shares, strict=True))
        if self._idle > max(sizes) + 2 * self.window_samples:
            raise DataError(
                f"no sample fits into {self.seq_length} tokens, even with the fewest tiles and frames; "
                "raise data.seq_length or choose other sources"
            )

    def _make_window(self, number: int) -> Window:
        sources, rows, lengths = self._draw(number)
        fits: dict[int, Fit] = {}
        kept, dropped = list(range(len(rows))), Counter[str]()
        if lengths and max(lengths) > self.seq_length:
            fits, lost = _fit_long(sources, rows, lengths, self.seq_length)
            dropped[TOO_LONG] = len(lost)
            kept = [i for i in kept if i not in lost]
        packs = pack_lengths([lengths[i] for i in kept], self.seq_length, self.packing)
        order = self._shuffle(f"packs {number}", len(packs))
        return Window(
            sources=sources,
            rows=rows,
            lengths=lengths,
            fits=fits,
            bins=[[kept[i] for i in packs[p]] for p in order],
            dropped=+dropped,
        )

    def _draw(self, number: int) -> tuple[list[PlanSource], list[int], list[int]]:
        """The samples of a window, mixed: source, row and full length of each."""
        owners, rows, lengths = [], [], []
        for index, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            first = share * number * self.window_samples // 1
            last = share * (number + 1) * self.window_samples // 1
            chosen = self._rows(source, np.arange(first, last))
            owners.append(np.full(len(chosen), index))
            rows.append(chosen)
            lengths.append(source.lengths[chosen])
        order = self._shuffle(f"samples {number}", sum(map(len, rows)))
        mixed_owners, mixed_rows, mixed_lengths = (np.concatenate(c)[order].tolist() for c in (owners, rows, lengths))
        return [self.sources[i] for i in mixed_owners], mixed_rows, mixed_lengths

    def _rows(self, source: PlanSource, positions: np.ndarray) -> np.ndarray:
        size = len(source.lengths)
        epochs = positions // size
        rows = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = f"order {self.seed} {source.name} {epoch}"
            rows[chosen] = keyed_permutation(positions[chosen] % size, size, key)
        return rows

    def _shuffle(self, purpose: str, size: int) -> list[int]:
        if not size:
            return []
        return keyed_permutation(np.arange(size), size, f"{purpose} {self.seed}").tolist()


def _fit_long(
    sources: Sequence[PlanSource], rows: Sequence[int], lengths: list[int], limit: int
) -> tuple[dict[int, Fit], set[int]]:
    """Reduce the samples above `limit`; returns their fits and those that never fit. `lengths` is updated in place."""
    fits: dict[int, Fit] = {}
    lost: set[int] = set()
    for i, length in enumerate(lengths):
        if length <= limit:
            continue
        fit = sources[i].shrink(rows[i], limit)
        if fit is None:
            lost.add(i)
        else:
            fits[i], lengths[i] = fit, fit.length
    return fits, lost


def _check_blend(sources: Sequence[PlanSource], packing: str, seq_length: int, window_samples: int) -> None:
    if packing not in PACKING_MODES:
        raise DataError(f"data.packing {packing!r} is not one of {', '.join(PACKING_MODES)}")
    if seq_length < 1 or window_samples < 1:
        raise DataError(f"data.seq_length ({seq_length}) and data.window_samples ({window_samples}) must be at least 1")
    for source in sources:
        if not 0 <= source.weight < float("inf"):
            raise DataError(f"data.sources.{source.name}.weight is {source.weight}; it must be 0 or more")
        if not len(source.lengths):
            raise DataError(f"data.sources.{source.name} has no samples")
    if not any(source.weight > 0 for source in sources):
        raise DataError("data.sources is empty or has no weight above 0; name at least one dataset")


def plan_pass(source: PlanSource, *, seq_length: int, packing: str, window_samples: int) -> Iterator[PlannedPack]:
    """One pass over a source in manifest order, packed window by window; samples that do not fit are left out."""
    number = 0
    for start in range(0, len(source.lengths), window_samples):
        rows = list(range(start, min(start + window_samples, len(source.lengths))))
        lengths = source.lengths[start : start + window_samples].tolist()
        owners = [source] * len(rows)
        fits, lost = _fit_long(owners, rows, lengths, seq_length)
        kept = [i for i in range(len(rows)) if i not in lost]
        bins = pack_lengths([lengths[i] for i in kept], seq_length, packing)
        window = Window(
            sources=owners,
            rows=rows,
            lengths=lengths,
            fits=fits,
            bins=[[kept[i] for i in items] for items in bins],
            dropped=Counter({TOO_LONG: len(lost)}),
        )
        for samples in window.packs:
            yield PlannedPack(number, samples)
            number += 1


def shrink_sample(
    shapes: Sequence[MediaShape], text_tokens: int, limit: int, rules: RenderRules, tokenizer: TextTokenizer
) -> Fit | None:
    """Largest budget under which a sample has at most `limit` tokens, from sizes alone.

    Args:
        shapes: Its media.
        text_tokens: Tokens that are not visual features, at the full budget.
        limit: Tokens of a pack.
        rules: The run's rules.
        tokenizer: Counts the frame labels, which depend on the frames taken.

    Returns:
        The fit, or None when even one tile an image and one frame a video is too much.
    """

    def media_tokens(max_tiles: int, max_frames: int) -> tuple[int, int]:
        labels = tiles = 0
        for shape in shapes:
            layout = lay_out(shape, rules, max_tiles=max_tiles, max_frames=max_frames)
            tiles += layout.tiles
            # <img> and </img> around every frame
            labels += frame_label_tokens(layout.frame_times, tokenizer) + 2 * len(layout.frame_times)
        return labels, tiles * rules.tokens_per_tile

    words = text_tokens - media_tokens(rules.max_tiles, rules.max_frames)[0]
    if words > limit:
        return None
    for max_tiles, max_frames in smaller_budgets(rules):
        length = words + sum(media_tokens(max_tiles, max_frames))
        if length <= limit:
            return Fit(max_tiles=max_tiles, max_frames=max_frames, length=length)
    return None


def plan_source(
    name: str, dataset: Dataset, rules: RenderRules, tokenizer: TextTokenizer, *, weight: float, max_samples: int | None
) -> PlanSource:
    """Describe an opened dataset to the planner; `max_samples` keeps the first rows of the split."""
    fits: dict[tuple[int, int], Fit | None] = {}

    def shrink(row: int, limit: int) -> Fit | None:
        if (row, limit) not in fits:
            fits[row, limit] = shrink_sample(
                dataset.shapes(row), int(dataset.text_tokens[row]), limit, rules, tokenizer
            )
        return fits[row, limit]

    return PlanSource(
        name=name,
        weight=weight,
        lengths=dataset.lengths[:max_samples],
        full=Fit(max_tiles=rules.max_tiles, max_frames=rules.max_frames, length=0),
        shrink=shrink,
        identity=dataset.manifest_sha256,
    )


def build_plan(
    config: DataConfig, datasets: Mapping[str, Dataset], rules: RenderRules, tokenizer: TextTokenizer, *, seed: int
) -> Plan:
    """The plan of a run over its opened sources.

    Raises:
        DataError: As `Plan`.
    """
    sources = [
        plan_source(name, datasets[name], rules, tokenizer, weight=source.weight, max_samples=source.max_samples)
        for name, source in config.sources.items()
    ]
    return Plan(
        sources,
        seed=seed,
        seq_length=config.seq_length,
        packing=config.packing,
        window_samples=config.window_samples,
    )
