"""What the layers have to know about the documents of a pack, and about this rank's share of its tokens.

Shape legend: S tokens in a pack, L tokens of this context parallel rank, N documents (repeated ends included).
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of tokens that one call of the scan's kernels takes, its documents numbered from the token before it.

    Attributes:
        tokens: Positions among the tokens that are scanned.
        ids: [1, n] int32; 0 goes on with the document of the token before the piece, 1 and above started later. The
            kernels let the state before the piece reach document 0 alone.
        halo_ids: [taps - 1] int32, the same numbers for the tokens just before; empty at the start of the pack.
    """

    tokens: slice
    ids: Tensor
    halo_ids: Tensor


@dataclass
class PackParams(PackedSeqParams):
    """megatron-core's packed parameters, made from a pack's own boundaries. Use `from_boundaries`.

    The boundaries are those of the whole pack, also where a rank holds some of its tokens: attention sees whole packs.
    `seq_idx` is [1, S] int32, the number of the document of every token of the whole pack.

    Attributes:
        context: Positions of the tokens that this rank holds.
        first_key: Start of the first document that this rank holds a token of.
        rotary: Rotary angles of these tokens, [L, 1, 1, D]; None for models without them.
    """

    context: range = field(default_factory=lambda: range(0))
    first_key: int = 0
    rotary: Tensor | None = None

    @classmethod
    def from_boundaries(
        cls, cu_seqlens: Tensor, seq_idx: Tensor, max_seqlen: int, context: range | None = None, first_key: int = 0
    ) -> "PackParams":
        """Describes a pack.

        Args:
            cu_seqlens: [N + 1] int32, starts of the documents and S; ends repeated to fill a bucket.
            seq_idx: [1, S] int32, number of the document of every token.
            max_seqlen: Longest document, rounded up at will; known on the host so that no kernel has to ask.
            context: Positions that this rank holds; all of them when None.
            first_key: Start of the document of the first of them; known on the host.
        """
        assert seq_idx.shape[:-1] == (1,), f"seq_idx is [1, S], not {tuple(seq_idx.shape)}"
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            seq_idx=seq_idx.contiguous(),
            pad_between_seqs=False,  # the tail of a pack is a document of its own
            context=range(seq_idx.shape[1]) if context is None else context,
            first_key=first_key,
        )

    @cached_property
    def documents(self) -> list[tuple[slice, slice]]:
        """Queries and keys of every document that has queries. Reads the device: only the `torch` backend asks."""
        asked, seen = self.cu_seqlens_q.tolist(), self.cu_seqlens_kv.tolist()
        bounds = zip(asked[:-1], asked[1:], seen[:-1], seen[1:], strict=True)
        return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in bounds if q1 > q0]

    @cached_property
    def position_ids(self) -> Tensor:
        """[L] int64, place of this rank's tokens in their documents."""
        tokens = torch.arange(self.context.start, self.context.stop, device=self.seq_idx.device)
        return tokens - self.cu_seqlens_q[self.seq_idx[0, self.context.start : self.context.stop].long()]

    @cached_property
    def own_queries(self) -> "PackParams":
        """The same pack with only this rank's tokens as queries: of every document, those that it holds.

        Its keys end where this rank's tokens end, so that a document's last query and last key are one token, and a
        causal mask aligned at the end is the right one. They begin at `first_key`: a document has keys only where it
        has queries, since cuDNN leaves the gradients of keys that nothing asks for as it found the memory.
        """
        held, seen = self.context, range(self.first_key, self.context.stop)
        return PackParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens_q.clamp(held.start, held.stop) - held.start,
            cu_seqlens_kv=self.cu_seqlens_kv.clamp(seen.start, seen.stop) - seen.start,
            max_seqlen_q=min(self.max_seqlen_q, len(held)),
            max_seqlen_kv=min(self.max_seqlen_kv, len(seen)),
            seq_idx=self.seq_idx,
            pad_between_seqs=False,
            context=held,
        )

    def pieces(self, *, whole: bool, longest: int, halo: int) -> list[Piece]:
        """Cuts what a Mamba layer scans into runs that its kernels can take. Made once a pack, then remembered.

        Args:
            whole: All tokens of the pack rather than this rank's.
            longest: Most tokens of a piece.
            halo: Tokens before a piece that its convolution sees.
        """
        key = (whole, longest, halo)
        if key not in self._pieces:
            held = range(self.seq_idx.shape[1]) if whole else self.context
            starts = range(held.start, held.stop, longest)
            self._pieces[key] = [
                self._piece(held.start, range(start, min(start + longest, held.stop)), halo) for start in starts
            ]
        return self._pieces[key]

    def _piece(self, first: int, tokens: range, halo: int) -> Piece:
        ids = self.seq_idx[:, tokens.start : tokens.stop]
        place = slice(tokens.start - first, tokens.stop - first)
        if tokens.start == 0:
            return Piece(place, ids.contiguous(), ids.new_empty(0))
        before = self.seq_idx[0, tokens.start - 1]
        assert tokens.start >= halo, "ranks and pieces hold at least a chunk"
        return Piece(place, ids - before, self.seq_idx[0, tokens.start - halo : tokens.start] - before)

    @cached_property
    def _pieces(self) -> dict[tuple[bool, int, int], list[Piece]]:
        return {}
