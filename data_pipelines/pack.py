"""From planned samples to a `Pack`: read, decode, tile, encode, join.

A sample that cannot be used is left out and reported: its pack gets a longer tail, and no other pack changes.
Shape legend: S tokens, T tiles, P tile side, N documents, n tokens of one sample.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_pipelines.config import LOSS_MODES, LOSS_UNITS, DataConfig, LossWeightConfig
from data_pipelines.dataset import Dataset, StoredSample
from data_pipelines.exceptions import DataError
from data_pipelines.media.image import decode_image, image_tiles
from data_pipelines.media.rules import MediaLayout, MediaShape, RenderRules, lay_out
from data_pipelines.media.video import video_tiles
from data_pipelines.schema import IGNORE_LABEL, MediaItem, Pack, media_items
from data_pipelines.sources import PlannedPack, PlannedSample
from data_pipelines.template import NO_TURN, EncodedSample, encode_record
from data_pipelines.tokenizer import TextTokenizer

STEPS = ("read", "text", "media", "join")
"""What building a pack consists of."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out of its pack.

    Attributes:
        key: Record id.
        dataset_id: Source name.
        reason: `storage`, `image`, `video`, `record` or `length`.
        message: What exactly was wrong.
    """

    key: str
    dataset_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class BuiltPack:
    """A pack and the fate of its samples.

    Attributes:
        pack: The pack.
        outcomes: One per planned sample, in order: None when it is in the pack.
    """

    pack: Pack
    outcomes: tuple[BadSample | None, ...]

    def pin_memory(self) -> "BuiltPack":
        """The same with its pack in page-locked memory; PyTorch's loader calls this where there is a device."""
        return replace(self, pack=self.pack.pin_memory())


@dataclass(frozen=True)
class _Piece:
    """One materialised sample: its tokens, weights and tiles [T, 3, P, P]."""

    key: str
    dataset_id: str
    encoded: EncodedSample
    weights: np.ndarray
    tiles: list[torch.Tensor]
    layouts: list[MediaLayout]


class _UnusableError(DataError):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def _quarantine_as(reason: str, name: str = "") -> Iterator[None]:
    """Errors of the block leave the sample out; a medium is named as its source called it."""
    try:
        yield
    except (DataError, OSError) as error:
        raise _UnusableError(reason, f"{name}: {error}" if name else str(error)) from error


def loss_weights(encoded: EncodedSample, config: LossWeightConfig) -> np.ndarray:
    """Weight of every target of a whole sample, before any slicing.

    `token` gives 1, `sample` 1/n, `square` 1/sqrt(n), with n the supervised tokens of the sample or of the target's own
    assistant turn (InternVL 2.5, arXiv 2412.05271; per turn as in Megatron-LM's multimodal example).

    Returns:
        [n] float32, 0 where there is no target.

    Raises:
        DataError: Unknown mode or unit.
    """
    if config.mode not in LOSS_MODES or config.unit not in LOSS_UNITS:
        raise DataError(
            f"data.loss has mode {config.mode!r} and unit {config.unit!r}; choose from {', '.join(LOSS_MODES)} and "
            f"{', '.join(LOSS_UNITS)}"
        )
    targets = encoded.turns != NO_TURN
    weights = np.zeros(len(targets), dtype=np.float32)
    groups = encoded.turns if config.unit == "turn" else np.where(targets, 0, NO_TURN)
    for group in np.unique(groups[targets]):
        members = groups == group
        count = np.float32(members.sum())
        weights[members] = {"token": np.float32(1), "sample": 1 / count, "square": 1 / np.sqrt(count)}[config.mode]
    return weights


class PackBuilder:
    """Builds packs; what it builds depends on nothing that it built before, so any process may build any pack.

    Attributes:
        seconds: Time spent so far in `read`, `text` (tokens and weights), `media` (decoding and tiling) and `join`.
    """

    def __init__(
        self, config: DataConfig, datasets: Mapping[str, Dataset], rules: RenderRules, tokenizer: TextTokenizer
    ) -> None:
        self.config, self.datasets, self.rules, self.tokenizer = config, datasets, rules, tokenizer
        self.seconds = dict.fromkeys(STEPS, 0.0)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - began

    def build(self, planned: PlannedPack) -> BuiltPack:
        """Build one pack; a pack without samples is all padding and weighs nothing."""
        pieces: list[_Piece] = []
        outcomes: list[BadSample | None] = []
        with self._timed("read"):
            read = self._read(planned.samples)
        for sample, stored in zip(planned.samples, read, strict=True):
            try:
                pieces.append(self._materialise(sample, stored))
                outcomes.append(None)
            except _UnusableError as error:
                key = self._name(sample)
                logger.warning(
                    "sample %s of %s left out of pack %d (%s): %s",
                    key,
                    sample.source,
                    planned.index,
                    error.reason,
                    error,
                )
                outcomes.append(BadSample(key, sample.source, error.reason, str(error)))
        reasons = Counter(bad.reason for bad in outcomes if bad)
        with self._timed("join"):
            pack = self._join(planned.index, pieces, reasons)
        return BuiltPack(pack, tuple(outcomes))

    def _name(self, sample: PlannedSample) -> str:
        try:
            return self.datasets[sample.source].key(sample.row)
        except DataError:
            return f"row {sample.row}"

    def _read(self, samples: Sequence[PlannedSample]) -> list[StoredSample | DataError]:
        """Bytes of all samples, in order; the samples of a source come together."""
        found: dict[PlannedSample, StoredSample | DataError] = {}
        for source in dict.fromkeys(sample.source for sample in samples):
            wanted = [sample for sample in samples if sample.source == source]
            stored = self.datasets[source].read_many([sample.row for sample in wanted])
            found |= dict(zip(wanted, stored, strict=True))
        return [found[sample] for sample in samples]

    def _materialise(self, sample: PlannedSample, stored: StoredSample | DataError) -> _Piece:
        if isinstance(stored, DataError):
            raise _UnusableError("storage", str(stored))
        layouts = [
            lay_out(shape, self.rules, max_tiles=sample.max_tiles, max_frames=sample.max_frames)
            for shape in stored.shapes
        ]
        with self._timed("text"), _quarantine_as("record"):
            encoded = encode_record(stored.record, layouts, self.tokenizer, tokens_per_tile=self.rules.tokens_per_tile)
        if len(encoded.input_ids) != sample.length:
            # Same rules and bytes, other count: the tokenizers library itself changed since the dataset was written.
            raise _UnusableError("length", f"{len(encoded.input_ids)} tokens where the plan has {sample.length}")
        weights = loss_weights(encoded, self.config.loss)
        items = list(media_items(stored.record))
        with self._timed("media"):
            tiles = media_tiles(items, stored.shapes, layouts, stored.media, self.rules)
        return _Piece(stored.record["id"], sample.source, encoded, weights, tiles, layouts)

    def _join(self, index: int, pieces: Sequence[_Piece], reasons: Mapping[str, int]) -> Pack:
        size = self.config.seq_length
        lengths = [len(piece.encoded.input_ids) for piece in pieces]
        used = sum(lengths)
        assert used <= size, (used, size)
        documents = [*lengths, size - used] if used < size else lengths
        bounds = np.concatenate([[0], np.cumsum(documents)])
        ids = np.full(size, self.tokenizer.pad_id, dtype=np.int64)
        labels = np.full(size, IGNORE_LABEL, dtype=np.int64)
        weights = np.zeros(size, dtype=np.float32)
        for start, piece in zip(bounds, pieces, strict=False):
            span = slice(start, start + len(piece.encoded.input_ids))
            ids[span], labels[span], weights[span] = piece.encoded.input_ids, piece.encoded.labels, piece.weights
        supervised = int((labels != IGNORE_LABEL).sum())
        places = self._tile_fields(pieces, bounds)
        visual = int(sum(piece.encoded.tile_tokens.sum() for piece in pieces))
        return Pack(
            index=index,
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            loss_weight=torch.from_numpy(weights),
            position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in documents])),
            seq_idx=torch.from_numpy(np.repeat(np.arange(len(documents), dtype=np.int32), documents)),
            cu_seqlens=torch.from_numpy(pad_bounds(bounds, self.config.document_bucket)),
            max_seqlen=min(round_up(max(documents), self.config.max_seqlen_bucket), size),
            sample_keys=tuple(piece.key for piece in pieces),
            dataset_ids=tuple(piece.dataset_id for piece in pieces),
            stats={
                "tokens": used,
                "supervised_tokens": supervised,
                "visual_tokens": visual,
                "padding": size - used,
                "num_samples": len(pieces),
                "quarantined": sum(reasons.values()),
                **{f"quarantined_{reason}": count for reason, count in sorted(reasons.items())},
            },
            **places,
        )

    def _tile_fields(self, pieces: Sequence[_Piece], bounds: np.ndarray) -> dict[str, Any]:
        side = self.rules.tile_size
        starts, owners, tiles = [], [], []
        thumbnails: list[bool] = []
        times: list[float] = []
        media = 0
        for start, piece in zip(bounds, pieces, strict=False):
            starts.append(piece.encoded.tile_start + start)
            owners.append(piece.encoded.media_of_tile + media)
            media += len(piece.layouts)
            # The text may place media in another order than the record lists them, so tiles follow the placement.
            for number in dict.fromkeys(piece.encoded.media_of_tile.tolist()):
                layout = piece.layouts[number]
                tiles.append(piece.tiles[number])
                thumbnails += [layout.thumbnail and i == layout.tiles - 1 for i in range(layout.tiles)]
                times += layout.frame_times if layout.kind == "video" else [float("nan")] * layout.tiles
        pruned = any(layout.frame_tokens for piece in pieces for layout in piece.layouts)
        counts = [piece.encoded.tile_tokens for piece in pieces] if pruned else []
        return {
            "tiles": torch.cat(tiles) if tiles else torch.empty((0, 3, side, side), dtype=torch.uint8),
            "tile_token_start": torch.from_numpy(np.concatenate([np.empty(0, np.int64), *starts])),
            "tile_tokens": torch.from_numpy(np.concatenate(counts)) if pruned else None,
            "media_of_tile": torch.from_numpy(np.concatenate([np.empty(0, np.int32), *owners]).astype(np.int32)),
            "is_thumbnail": torch.tensor(thumbnails, dtype=torch.bool),
            "frame_time": torch.tensor(times, dtype=torch.float32),
        }


def media_tiles(
    items: Sequence[MediaItem],
    shapes: Sequence[MediaShape],
    layouts: Sequence[MediaLayout],
    media: Mapping[str, bytes],
    rules: RenderRules,
) -> list[torch.Tensor]:
    """Decode and tile every medium of a record.

    Args:
        items: The record's media, in its order.
        shapes: What each was when it was stored.
        layouts: How many tiles or which frames to take of each.
        media: Bytes by member name.
        rules: Tile size.

    Returns:
        One [tiles, 3, P, P] uint8 tensor per medium.

    Raises:
        DataError: A medium is damaged, or not what `shapes` says.
    """
    tiles = []
    for item, shape, layout in zip(items, shapes, layouts, strict=True):
        data = media[item.member]
        with _quarantine_as(item.kind, item.source):
            if item.kind == "video":
                tiles.append(video_tiles(data, layout.frame_indices, rules.tile_size, shape.frames))
            else:
                tiles.append(_tiles_of_image(data, shape, layout, rules.tile_size))
    return tiles


def _tiles_of_image(data: bytes, shape: MediaShape, layout: MediaLayout, tile_size: int) -> torch.Tensor:
    pixels = decode_image(data)
    height, width = pixels.shape[:2]
    if (width, height) != (shape.width, shape.height):
        raise DataError(f"decodes to {width}x{height} pixels, its header says {shape.width}x{shape.height}")
    return image_tiles(pixels, layout, tile_size)


def pad_bounds(bounds: np.ndarray, bucket: int) -> np.ndarray:
    """Boundaries [N + 1] -> [Nb + 1] int32, the end repeated: few distinct sizes mean few kernel plans."""
    padded = round_up(len(bounds) - 1, bucket) + 1
    return np.concatenate([bounds, np.full(padded - len(bounds), bounds[-1])]).astype(np.int32)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below a value."""
    return -(-value // multiple) * multiple
