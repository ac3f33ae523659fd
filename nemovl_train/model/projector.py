"""The connector between tower and language model: RMSNorm, linear, squared ReLU, linear; no biases.

Source: arXiv 2511.03929 section 2; the released weights `mlp1.0`, `mlp1.1` and `mlp1.3`. The predecessor's has a
LayerNorm, exact GELU and biases (vLLM `nemotron_vl.py`).

Shape suffixes: J width of a pixel-shuffled patch feature (4 tower widths), F inner width, H language model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nemovl_train.config.schema import ModelConfig, ProjectorConfig
from nemovl_train.model.backend import Backend
from nemovl_train.model.language import COMMON_OPTIONS
from nemovl_train.model.recompute import squared_relu
from nemovl_train.parallel.layout import Layout

# isort: split
# The backend module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule


class Projector(MegatronModule):
    """Two-layer MLP on pixel-shuffled patch features.

    Parameters: `norm.weight` [J], `linear_fc1.weight` [F, J], `linear_fc2.weight` [H, F]; with a LayerNorm `norm.bias`
    [J], with biases `linear_fc1.bias` [F] and `linear_fc2.bias` [H].

    Args:
        config: Sizes of all parts; the projector's own width, and the widths on both sides of it.
        layout: Owner of the process groups; the projector is data-parallel over all ranks.
        params_dtype: Dtype of the weights.
        backend: Provider of the leaf modules.
    """

    def __init__(self, config: ModelConfig, layout: Layout, params_dtype: torch.dtype, backend: Backend) -> None:
        joined = 4 * config.vision.hidden_size
        inner = config.projector.ffn_hidden_size
        transformer = _transformer_config(joined, config.projector, params_dtype)
        super().__init__(transformer)
        self.tp_group = layout.vision_groups.tp
        self.activation: Callable[[Tensor], Tensor] = squared_relu
        if config.projector.activation == "gelu":
            self.activation = F.gelu
        self.norm = backend.norm(config=transformer, hidden_size=joined, eps=config.projector.norm_eps)
        linear = {
            "config": transformer,
            "init_method": transformer.init_method,
            "bias": config.projector.bias,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.linear_fc1 = backend.column_linear(joined, inner, gather_output=False, tp_comm_buffer_name="fc1", **linear)
        self.linear_fc2 = backend.row_linear(
            inner, config.language.hidden_size, input_is_parallel=True, tp_comm_buffer_name="fc2", **linear
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project visual tokens into the language model's embedding space.

        Args:
            features: [..., J] in the projector's dtype.

        Returns:
            [..., H] in the same dtype.
        """
        hidden, _ = self.linear_fc1(self.norm(features))
        projected, _ = self.linear_fc2(self.activation(hidden))
        return projected


def _transformer_config(joined: int, size: ProjectorConfig, params_dtype: torch.dtype) -> TransformerConfig:
    """What the leaf modules read: dtypes, fusions and the norm. The projector has no layers or heads of its own."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=joined,
        num_attention_heads=1,
        ffn_hidden_size=size.ffn_hidden_size,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[size.norm],
        layernorm_epsilon=size.norm_eps,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        **COMMON_OPTIONS,
    )
