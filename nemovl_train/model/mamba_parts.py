"""Sizes and parameters of a Mamba-2 layer outside its projections, whole or one rank's share.

Shape legend: S tokens, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402

LONGEST_OFFSET = 2**31 - 1
"""Largest element offset of the kernels. Seen on an H100: right at 90,112 tokens of 22,656 columns (0.95 x 2^31), wrong
without an error at 98,304 (1.04 x 2^31)."""


@dataclass(frozen=True, kw_only=True)
class MambaSizes:
    """Sizes of one rank's part of the layer."""

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    chunk: int

    @property
    def inner(self) -> int:
        """Columns of z, of x and of the output."""
        return self.heads * self.head_dim

    @property
    def columns(self) -> list[int]:
        """Columns of z, x, B, C and dt in the input projection's output."""
        return [self.inner, self.inner, *[self.groups * self.state] * 2, self.heads]

    @property
    def channels(self) -> list[int]:
        """Channels of x, B and C in the convolution."""
        return self.columns[1:4]

    @property
    def group_size(self) -> int:
        """Columns that the gated norm treats together."""
        return self.inner // self.groups

    @property
    def longest_piece(self) -> int:
        """Most tokens, in whole chunks, whose offsets the kernels can count in their widest tensor.

        Per token that is the projection's output, a chunk's state, or the partial gradients of B and C.
        """
        widest = max(sum(self.columns), self.inner * self.state // self.chunk, self.heads * self.state)
        return max(LONGEST_OFFSET // widest // self.chunk, 1) * self.chunk

    def shared(self, ranks: int) -> MambaSizes:
        """Sizes when ranks share the heads."""
        return replace(self, heads=self.heads // ranks, groups=self.groups // ranks)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of gate, convolved columns and dt."""
        return projected.split([self.inner, sum(self.channels), self.heads], dim=1)

    def states(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of x [S, H, P], B and C [S, G, N] in what is or was convolved."""
        x, b, c = mixed.split(self.channels, dim=1)
        return x.unflatten(1, (-1, self.head_dim)), b.unflatten(1, (-1, self.state)), c.unflatten(1, (-1, self.state))


@dataclass(frozen=True, eq=False)
class MambaParameters:
    """The layer's parameters outside its projections, whole or a share of the heads."""

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    a_log: Tensor
    d: Tensor
    norm_weight: Tensor

    def share(self, sizes: MambaSizes, rank: int, ranks: int) -> MambaParameters:
        """This rank's share when ranks split the heads."""

        def cut(parameter: Tensor) -> Tensor:
            return parameter.unflatten(0, (ranks, -1))[rank]

        def cut_channels(parameter: Tensor) -> Tensor:
            return torch.cat([cut(part) for part in parameter.split(sizes.channels)])

        conv = (cut_channels(self.conv_weight), cut_channels(self.conv_bias))
        return MambaParameters(*conv, *(cut(p) for p in (self.dt_bias, self.a_log, self.d, self.norm_weight)))

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields."""
        return self.conv_weight, self.conv_bias, self.dt_bias, self.a_log, self.d, self.norm_weight


class GatedNorm(MegatronModule):
    """Holds the weight of the gated RMSNorm, split over tensor parallel ranks by whole groups; the mixer applies it.

    It is called for its weight, since megatron-core collects updated weights when their module is called.
    """

    def __init__(self, config: TransformerConfig, local_size: int, tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(local_size, dtype=config.params_dtype, device=device))
        mark_split(self.weight)

    def forward(self) -> Tensor:
        """The weight."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight as a tensor split along its only axis."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def mark_split(parameter: nn.Parameter) -> None:
    """Tells megatron-core that tensor parallel ranks hold different rows of a parameter."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = 0  # type: ignore[attr-defined]
