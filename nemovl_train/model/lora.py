"""The low-rank pair (LoRA, arXiv 2106.09685) on one linear layer, under tensor, sequence and context parallelism.

    y = W x + alpha / rank * B (A x)        W frozen, A [R, I], B [O, R], B = 0 at first

The linear layer keeps its class, its weight's name and its own communication; the addition is a forward hook on it, so
that both backends and every layer that calls its linear get it alike. What tensor parallel ranks share follows W:

    column parallel   A whole on every rank, B split by rows:     x --A--> gathered (or copied) --B--> rank's columns
    row parallel      A split by columns, B whole on every rank:  rank's columns --A--> summed --B--> rows of the stream

Only R numbers a token travel. The whole half sees all tokens where ranks hold copies of the stream, and its gradient is
then the same on all of them; with sequence parallelism it sees the rank's own tokens, and `sequence_parallel` on the
parameter makes megatron-core sum its gradient over the ranks. Context parallel ranks hold other tokens of the same
matrices: their gradients are summed with those of data parallel ranks.

Shape suffixes: L tokens of this rank, R rank of the adapter, I and O widths of a linear layer's input and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemovl_train.config.adapters import Linear
from nemovl_train.config.schema import AdapterConfig
from nemovl_train.model.init import component_sizes
from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm.utils import _split_tensor_factory  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402

ADAPTER = "adapter"
"""Name of the pair inside its linear layer: `...in_proj.adapter.lora_a` and `.lora_b`."""


class Adapter(nn.Module):
    """The pair of one linear layer.

    Args:
        linear: The layer; its weight says how tensor parallel ranks share it.
        spec: Its whole sizes.
        adapter: Rank and scale.
        groups: Process groups of its part.
        sequence_parallel: Whether tensor parallel ranks share the tokens outside of the layer.
    """

    def __init__(
        self,
        linear: Any,
        spec: Linear,
        adapter: AdapterConfig,
        groups: ProcessGroupCollection,
        *,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        weight, ranks = linear.weight, groups.tp.size()
        self.groups, self.sequence_parallel = groups, sequence_parallel and ranks > 1
        self.column = spec.split == "outputs"
        self.scale = adapter.alpha / adapter.rank
        inputs, outputs = (spec.inputs, spec.outputs // ranks) if self.column else (spec.inputs // ranks, spec.outputs)
        assert weight.shape == (outputs, inputs), f"{spec.name} is {tuple(weight.shape)}, not {(outputs, inputs)}"
        options = {"dtype": weight.dtype, "device": weight.device}
        self.lora_a = nn.Parameter(torch.empty(adapter.rank, inputs, **options))
        self.lora_b = nn.Parameter(torch.empty(outputs, adapter.rank, **options))
        split, whole = (self.lora_b, self.lora_a) if self.column else (self.lora_a, self.lora_b)
        _mark_split(split, like=weight, dim=0 if self.column else 1)
        _mark_whole(whole, summed=self.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled B A x, as the layer's own output is split or whole: [L, 1, I] -> [L, 1, O]."""
        low, group = F.linear(x, self.lora_a) * self.scale, self.groups.tp
        if group.size() > 1:
            low = self._exchanged(low)
        return F.linear(low, self.lora_b)

    def _exchanged(self, low: Tensor) -> Tensor:
        """[L, 1, R] of all ranks' tokens or columns, where the second matrix needs it."""
        group = self.groups.tp
        if self.column:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, group=group)
            return copy_to_tensor_model_parallel_region(low, group=group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=group)
        return reduce_from_tensor_model_parallel_region(low, group=group)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """W + alpha / rank * B A in float32, for a whole (not tensor parallel) layer."""
        assert self.groups.tp.size() == 1, "adapters are merged in one process"
        return merged_weight(weight, self.lora_a, self.lora_b, self.scale)

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Both matrices for a distributed checkpoint, each under its parameter name.

        Args:
            prefix: Put in front of both names.
        """
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"lora_b": 0} if self.column else {"lora_a": 1},
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )
        # z, x, B, C and dt of a Mamba layer, gate and up of a SwiGLU: split one by one, so saved one by one.
        parts = component_sizes(self.lora_b) if self.column else []
        if len(parts) > 1:
            names = [f"part{number}" for number in range(len(parts))]
            state[f"{prefix}lora_b"] = _split_tensor_factory(state[f"{prefix}lora_b"], parts, names, 0)
        return state


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + scale * B A in float32.

    Args:
        weight: [O, I].
        lora_a: [R, I].
        lora_b: [O, R].
        scale: Alpha over rank.
    """
    return weight.float() + scale * (lora_b.float() @ lora_a.float())


def attach(linear: Any, pair: Adapter) -> None:
    """Make a linear layer add what its pair gives."""
    linear.add_module(ADAPTER, pair)
    # First: a hook that drops the layer's input for recomputation comes after everything that reads it.
    linear.register_forward_hook(_add_low_rank, prepend=True)


@torch.no_grad()
def merge(linear: Any) -> None:
    """Add the pair to the layer's weight, computed in float32 and kept in the weight's format, and take it away."""
    linear.weight.copy_(linear.adapter.merged(linear.weight))
    delattr(linear, ADAPTER)
    for key, hook in list(linear._forward_hooks.items()):
        if hook is _add_low_rank:
            del linear._forward_hooks[key]


def adapters(module: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(name, pair) of every adapter below a module."""
    return ((name, found) for name, found in module.named_modules() if isinstance(found, Adapter))


def _add_low_rank(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> Any:
    """Forward hook: megatron-core's linears, of both backends, give (output, bias to add later)."""
    result, bias = output
    return result + linear.adapter(inputs[0]), bias


def _mark_whole(parameter: nn.Parameter, *, summed: bool) -> None:
    """Tell megatron-core whether tensor parallel ranks each have the gradient of their own tokens alone."""
    parameter.sequence_parallel = summed  # type: ignore[attr-defined]


def _mark_split(parameter: nn.Parameter, *, like: Tensor, dim: int) -> None:
    """Tell megatron-core, initial weights and checkpoints that tensor parallel ranks hold parts of a parameter."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    if dim == 0:
        for name in ("partition_sizes", "partition_stride"):
            if hasattr(like, name):
                setattr(parameter, name, getattr(like, name))
