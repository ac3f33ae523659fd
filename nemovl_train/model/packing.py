"""What the layers have to know about the documents of a pack.

Shape legend: S tokens in a pack, N documents (repeated ends included).
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402


@dataclass
class PackParams(PackedSeqParams):
    """megatron-core's packed parameters, made from a pack's own boundaries. Use `from_boundaries`."""

    @classmethod
    def from_boundaries(cls, cu_seqlens: Tensor, seq_idx: Tensor, max_seqlen: int) -> "PackParams":
        """Describes a pack.

        Args:
            cu_seqlens: [N + 1] int32, starts of the documents and S; ends repeated to fill a bucket.
            seq_idx: [1, S] int32, number of the document of every token.
            max_seqlen: Longest document, rounded up at will; known on the host so that no kernel has to ask.
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
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of the documents that hold tokens. Reads the device: only the `torch` backend asks, once a pack."""
        return [n for n in self.cu_seqlens_q.diff().tolist() if n]
