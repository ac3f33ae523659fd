"""Leaf modules of the `te` backend. Imported only where Transformer Engine and CUDA are there."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformer_engine.common.recipe import Float8BlockScaling, Format

from nemovl_train.exceptions import UserError
from nemovl_train.model.backend import Backend
from nemovl_train.model.fp8 import Context

# megatron-core has no name of its own for it and passes on this one's.
_ENDS_ALIGNED = SimpleNamespace(name="padding_causal_bottom_right")


class _NoExtraState:
    """Takes Transformer Engine's `_extra_state` entries out of state dicts.

    They hold amax histories of delayed FP8 scaling, which we do not use (our FP8 is block-wise, without history), and
    would make checkpoint keys depend on the backend. `nn.Module` writes the entry only where the class overrides these.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class PlainColumnParallelLinear(_NoExtraState, TEColumnParallelLinear):
    """megatron-core's Transformer Engine linear, rows split."""


class PlainRowParallelLinear(_NoExtraState, TERowParallelLinear):
    """megatron-core's Transformer Engine linear, columns split."""


class PlainAttention(_NoExtraState, TEDotProductAttention):
    """megatron-core's Transformer Engine attention, also for packs in which documents have fewer queries than keys."""

    def forward(self, *args: Any, attn_mask_type: Any, **options: Any) -> torch.Tensor:
        """megatron-core's forward; it translates the mask of a pack's documents only where queries are keys."""
        if attn_mask_type == AttnMaskType.causal_bottom_right:
            attn_mask_type = _ENDS_ALIGNED
        return super().forward(*args, attn_mask_type=attn_mask_type, **options)


class PlainRMSNorm(_NoExtraState, te.RMSNorm):
    """Transformer Engine's RMSNorm."""


class PlainLayerNorm(_NoExtraState, te.LayerNorm):
    """Transformer Engine's LayerNorm."""


def te_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
    """The norm that `config.normalization` names; its parameters carry `sequence_parallel` for the gradient sum."""
    norm = {"RMSNorm": PlainRMSNorm, "LayerNorm": PlainLayerNorm}[config.normalization]
    return norm(
        hidden_size,
        eps=eps,
        sequence_parallel=config.sequence_parallel,
        params_dtype=config.params_dtype,
        device=torch.cuda.current_device(),
    )


def fp8_context() -> Context:
    """Transformer Engine's context of block-wise E4M3 for inputs, weights and gradients; attention stays as it is.

    Raises:
        UserError: The GPU, or its CUDA, has no block-wise FP8.
    """
    possible, reason = te.is_fp8_block_scaling_available(return_reason=True)
    if not possible:
        raise UserError(f"precision.fp8=blockwise: {torch.cuda.get_device_name()}: {reason}; set precision.fp8=none")
    return partial(te.autocast, enabled=True, recipe=Float8BlockScaling(fp8_format=Format.E4M3))


TE = Backend(
    name="te",
    norm=te_norm,
    column_linear=PlainColumnParallelLinear,
    row_linear=PlainRowParallelLinear,
    core_attention=PlainAttention,
    fp8=fp8_context,
)
