"""What planning knows about one source, and the windows of samples that become packs."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.config import CostConfig, SourceConfig
from data_pipelines.dataset import Dataset
from data_pipelines.fit import Fit, shrink_sample
from data_pipelines.media.rules import RenderRules
from data_pipelines.packing import pack_lengths
from data_pipelines.tokenizer import TextTokenizer

TOO_LONG = "longer_than_pack"
NO_ROOM = "no_room_in_window"
_FITS_KEPT = 65536
_CHUNK = 1 << 20


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
class PlanSource:
    """What planning needs to know about one source.

    Attributes:
        name: Name in the blend: two names of one folder get different orders.
        weight: Share of the blend in samples, relative to the others.
        epochs: Passes over the source for each pass of the blend; takes the place of `weight` when given.
        lengths: [rows] integers, tokens of each sample at the full budget.
        text_tokens: [rows] integers, the part of `lengths` that is not visual features.
        least: [rows] integers, tokens of each sample at the smallest budget.
        full: Fit of a sample that needs no reduction, its length left at 0.
        shrink: Maps (row, limit) to the largest Fit of at most `limit` tokens, or None.
        identity: Hash of the manifest.
        block: Neighbouring rows that the order keeps together.
    """

    name: str
    weight: float
    lengths: np.ndarray
    text_tokens: np.ndarray
    least: np.ndarray
    full: Fit
    shrink: Callable[[int, int], Fit | None]
    identity: str
    epochs: float | None = None
    block: int = 1024

    def sizes(self, limit: int) -> np.ndarray:
        """[rows] integers: tokens of a pack of `limit` that each sample may take, 0 for one that never fits."""
        if int(self.lengths.max()) <= limit:
            return self.lengths
        sizes = np.empty_like(self.lengths, subok=False)
        for start in range(0, len(sizes), _CHUNK):  # without temporaries of the size of the dataset
            part = slice(start, start + _CHUNK)
            np.minimum(self.lengths[part], limit, out=sizes[part])
            sizes[part][self.least[part] > limit] = 0
        return sizes


def plan_source(
    name: str, dataset: Dataset, rules: RenderRules, tokenizer: TextTokenizer, config: SourceConfig, block_mib: float
) -> PlanSource:
    """Describe an opened dataset to the planner; `config.max_samples` keeps the first rows of the split."""

    @functools.lru_cache(maxsize=_FITS_KEPT)
    def shrink(row: int, limit: int) -> Fit | None:
        return shrink_sample(dataset.shapes(row), int(dataset.text_tokens[row]), limit, rules, tokenizer)

    rows = slice(config.max_samples)
    return PlanSource(
        name=name,
        weight=config.weight,
        epochs=config.epochs,
        lengths=dataset.lengths[rows],
        text_tokens=dataset.text_tokens[rows],
        least=dataset.least_tokens[rows],
        full=Fit(max_tiles=rules.max_tiles, max_frames=rules.max_frames, length=0),
        shrink=shrink,
        identity=dataset.identity,
        block=max(1, min(1024, int(block_mib * 2**20 / dataset.mean_bytes))),
    )


@dataclass(kw_only=True)
class Draw:
    """Samples of one window before packing, as columns: `PlannedSample`s cost more than packing does.

    Attributes:
        sources: All sources of the blend.
        owners: [n] number of the source of each sample.
        rows: [n] its row.
        lengths: [n] its tokens; after `fit`, under the budget that fits.
        texts: [n] the part that is not visual features, at the full budget.
        fits: Budget of each sample that was reduced, by number.
    """

    sources: Sequence[PlanSource]
    owners: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    texts: np.ndarray
    fits: dict[int, Fit]

    @classmethod
    def of(cls, sources: Sequence[PlanSource], chosen: Sequence[np.ndarray], order: np.ndarray | None) -> "Draw":
        """The chosen rows of each source, mixed in an order."""
        owners = np.repeat(np.arange(len(sources)), [len(rows) for rows in chosen])
        lengths = [source.lengths[rows] for source, rows in zip(sources, chosen, strict=True)]
        texts = [source.text_tokens[rows] for source, rows in zip(sources, chosen, strict=True)]
        columns = [owners, *(np.concatenate(parts) for parts in (chosen, lengths, texts))]
        if order is not None:
            columns = [column[order] for column in columns]
        owners, rows, tokens, words = columns
        return cls(sources=sources, owners=owners, rows=rows, lengths=tokens, texts=words, fits={})

    def fit(self, limit: int) -> np.ndarray:
        """Reduce samples above a limit; returns which samples fit, in order."""
        kept = np.ones(len(self.rows), dtype=bool)
        long = np.flatnonzero(self.lengths > limit)
        if len(long):
            self.lengths = self.lengths.copy()
        # Neighbours in the manifest one after the other: their rows are read together.
        for i in long[np.lexsort((self.rows[long], self.owners[long]))].tolist():
            fit = self.sources[self.owners[i]].shrink(int(self.rows[i]), limit)
            if fit is None:
                kept[i] = False
            else:
                self.fits[i], self.lengths[i] = fit, fit.length
        return np.flatnonzero(kept)

    def sample(self, i: int) -> PlannedSample:
        """One sample as packs name it."""
        source = self.sources[self.owners[i]]
        fit = self.fits.get(i, source.full)
        return PlannedSample(source.name, int(self.rows[i]), fit.max_tiles, fit.max_frames, int(self.lengths[i]))


@dataclass(kw_only=True)
class Window:
    """Packed samples of one window, and what became of those that did not fit.

    Attributes:
        draw: The samples.
        bins: Sample numbers of each pack, packs in the order of the stream.
        costs: [packs] float64 modelled cost of each pack, in tokens through the language model.
        dropped: Samples left out, by reason.
    """

    draw: Draw
    bins: list[list[int]]
    costs: np.ndarray
    dropped: Counter[str]

    def pack(self, number: int) -> tuple[PlannedSample, ...]:
        """Samples of one pack of the window."""
        return tuple(self.draw.sample(i) for i in self.bins[number])

    @property
    def packs(self) -> list[tuple[PlannedSample, ...]]:
        """Samples of every pack."""
        return [self.pack(i) for i in range(len(self.bins))]


def pack_window(draw: Draw, seq_length: int, packing: str, cost: CostConfig, packs: int | None = None) -> Window:
    """Fit and pack the samples of a window; packs come in the packer's own order."""
    kept = draw.fit(seq_length)
    bins, over = pack_lengths(draw.lengths[kept].tolist(), seq_length, packing, packs)
    numbers = kept.tolist()
    bins = [[numbers[i] for i in items] for items in bins]
    dropped = Counter({TOO_LONG: len(draw.rows) - len(kept), NO_ROOM: len(over)})
    return Window(draw=draw, bins=bins, costs=_costs(draw, bins, seq_length, cost), dropped=+dropped)


def _costs(draw: Draw, bins: Sequence[Sequence[int]], seq_length: int, cost: CostConfig) -> np.ndarray:
    """Padding runs through the language model like any token: packs differ in what they show and how they are cut."""
    members = np.fromiter((i for items in bins for i in items), dtype=np.int64)
    packs = np.repeat(np.arange(len(bins)), [len(items) for items in bins])
    lengths = draw.lengths[members].astype(np.float64)
    visual = np.maximum(lengths - draw.texts[members], 0)
    work = cost.visual_token * visual + cost.attention_pair * lengths * lengths
    return seq_length + np.bincount(packs, weights=work, minlength=len(bins))


def plan_pass(source: PlanSource, *, seq_length: int, packing: str, window_samples: int) -> Iterator[PlannedPack]:
    """One pass over a source in manifest order, packed window by window; samples that do not fit are left out."""
    number = 0
    for start in range(0, len(source.lengths), window_samples):
        rows = np.arange(start, min(start + window_samples, len(source.lengths)))
        window = pack_window(Draw.of([source], [rows], None), seq_length, packing, CostConfig())
        for samples in window.packs:
            yield PlannedPack(number, samples)
            number += 1
