"""One pack on the device: this rank's share of its tokens and tiles.

Shape suffixes: S tokens in a pack, L of them on this context parallel rank, T tiles of the pack, t of them dealt to
this rank, P tile side in pixels, N documents, M positions with a target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from data_pipelines.schema import Pack
from nemovl_train.exceptions import DataError
from nemovl_train.model.packing import PackParams
from nemovl_train.parallel.layout import Layout
from nemovl_train.parallel.tiles import dealt_tiles


@dataclass(frozen=True, eq=False)
class PackBatch:
    """Device tensors of one pack, and the pack itself for what is cheaper to know on the host.

    Weights and labels were made for whole samples before anything is sliced.

    Attributes:
        pack: The whole pack on the host. Checks and plans read it, so that they never wait for the device.
        input_ids: [L] int64, one image token per visual feature.
        labels: [L] int64, the token to predict at each position; -100 where there is none.
        loss_weight: [L] float32, 0 where unsupervised.
        supervised: [M] int64, positions among the L that have a target.
        params: Document boundaries of the whole pack as the layers take them, and which tokens this rank holds.
        tiles: [t, 3, P, P] uint8, the tiles that this rank encodes, in token order.
    """

    pack: Pack
    input_ids: Tensor
    labels: Tensor
    loss_weight: Tensor
    supervised: Tensor
    params: PackParams
    tiles: Tensor

    @classmethod
    def from_pack(cls, pack: Pack, layout: Layout) -> PackBatch:
        """Copy this rank's share of a pack to its device, asynchronously where its memory is pinned.

        Args:
            pack: Pack on the host, the same on all ranks that share it.
            layout: Says which share.
        """

        def put(tensor: Tensor) -> Tensor:
            return tensor.to(layout.device, non_blocking=True)

        held = layout.context_tokens(len(pack.input_ids))
        tokens = slice(held.start, held.stop)
        labels = pack.labels[tokens]
        dealt = dealt_tiles(pack.tile_token_start, layout.pack_rank, layout.pack_ranks)
        return cls(
            pack=pack,
            input_ids=put(pack.input_ids[tokens]),
            labels=put(labels),
            loss_weight=put(pack.loss_weight[tokens]),
            supervised=put((labels >= 0).nonzero()[:, 0]),
            params=PackParams.from_boundaries(
                put(pack.cu_seqlens),
                put(pack.seq_idx)[None],
                pack.max_seqlen,
                held,
                first_key=int(pack.cu_seqlens[pack.seq_idx[held.start]]),
            ),
            tiles=put(_rows(pack.tiles, dealt)),
        )

    def scaled(self, factor: float) -> PackBatch:
        """The same batch with its loss weights multiplied by `factor`."""
        return replace(self, loss_weight=self.loss_weight * factor)

    def check_tiles(self, image_token: int, tokens_per_tile: int, tile_size: int) -> None:
        """Refuse a pack whose image tokens and tiles do not belong together.

        Args:
            image_token: Id of `<image>`.
            tokens_per_tile: Visual features of a tile.
            tile_size: Side of the tower's tiles in pixels.

        Raises:
            DataError: Tiles of another size; a sample has more or fewer image tokens than its tiles have features; or
                they are elsewhere than `tile_token_start` says.
        """
        pack = self.pack
        tile_tokens = torch.full_like(pack.tile_token_start, tokens_per_tile)
        if pack.tile_tokens is not None:
            tile_tokens = pack.tile_tokens
        if not pack.tiles.shape[0] == len(pack.tile_token_start) == len(tile_tokens):
            raise DataError(
                f"the pack with samples {list(pack.sample_keys)} has {pack.tiles.shape[0]} tiles but "
                f"{pack.tile_token_start.shape[0]} starts and {len(tile_tokens)} counts of tiles. Build the pack again."
            )
        if pack.tiles.shape[0] and tuple(pack.tiles.shape[1:]) != (3, tile_size, tile_size):
            raise DataError(
                f"the tiles of samples {list(pack.sample_keys)} have shape {list(pack.tiles.shape[1:])}, the vision "
                f"tower takes [3, {tile_size}, {tile_size}]; set data.tile_size={tile_size}"
            )
        found = (pack.input_ids == image_token).nonzero()[:, 0]
        order = pack.tile_token_start.argsort()
        starts, counts = pack.tile_token_start[order], tile_tokens[order]
        ends = counts.cumsum(0)
        runs = torch.repeat_interleave(starts - ends + counts, counts) + torch.arange(int(counts.sum()))
        if not torch.equal(found, runs) or (counts > tokens_per_tile).any():
            self._refuse_image_tokens(found, starts.clamp(0, len(pack.input_ids) - 1), counts, image_token)

    def _refuse_image_tokens(self, found: Tensor, starts: Tensor, counts: Tensor, image_token: int) -> NoReturn:
        """Name the first sample whose counts differ, or the pack if only the places do."""
        seq_idx = self.pack.seq_idx
        documents = int(seq_idx.max()) + 1
        tokens_N = torch.bincount(seq_idx[found], minlength=documents)
        tiles_N = torch.bincount(seq_idx[starts], minlength=documents)
        features_N = torch.bincount(seq_idx[starts], counts, minlength=documents).long()
        for document in (tokens_N != features_N).nonzero()[:, 0].tolist():
            raise DataError(
                f"sample {self._sample_key(document)!r} has {int(tokens_N[document])} image tokens (id {image_token}) "
                f"but {int(tiles_N[document])} tiles, which give {int(features_N[document])} visual features. "
                "Remove literal image tags from its text, or build the pack again for this model's tile size."
            )
        raise DataError(
            f"the image tokens (id {image_token}) of the pack with samples {list(self.pack.sample_keys)} are not where "
            "tile_token_start says. Build the pack again."
        )

    def _sample_key(self, document: int) -> str:
        """Key of a document's sample; the document after the last sample is the padding tail."""
        keys = self.pack.sample_keys
        return keys[document] if document < len(keys) else "padding"


def _rows(tiles: Tensor, dealt: Tensor) -> Tensor:
    """Tiles by number; a view where they lie one after the other, as packs are built."""
    first = int(dealt[0]) if len(dealt) else 0
    if torch.equal(dealt, torch.arange(first, first + len(dealt))):
        return tiles[first : first + len(dealt)]
    return tiles[dealt]
