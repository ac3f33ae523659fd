"""The vision tower: megatron-core's RADIO ViT between our pixel normalisation and pixel shuffle.

The tower is a C-RADIOv2-H (arXiv 2412.07679; github NVlabs/RADIO): patch embedding, a learned position grid that is
resized to the tile's grid, prefix tokens in front, pre-norm transformer layers, and no norm at the end.

Shape suffixes: T tiles, P tile side in pixels, G patches along one side of a tile, D tower width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemovl_train.config.schema import VisionConfig
from nemovl_train.model.backend import Backend
from nemovl_train.model.chunks import TILES_AT_A_TIME, TILES_ENCODED_AGAIN
from nemovl_train.model.language import COMMON_OPTIONS
from nemovl_train.parallel.layout import Layout

# isort: split
# The backend module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.vision.radio import RADIOViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

_SHUFFLE = 2
"""Patches along one side of the square that becomes one visual token."""


class VisionTower(RADIOViTModel):
    """RADIO ViT that takes raw tiles and gives pixel-shuffled patch features.

    Args:
        config: Sizes and pixel statistics.
        transformer: The same as megatron-core's config.
        layer: Spec of one transformer layer.
        groups: Process groups with tensor parallel size 1.
    """

    def __init__(
        self, config: VisionConfig, transformer: TransformerConfig, layer: ModuleSpec, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            transformer,
            layer,
            class_token_len=config.prefix_tokens,
            patch_dim=config.patch_size,
            img_h=config.tile_size,
            img_w=config.tile_size,
            max_img_h=config.max_resolution,
            max_img_w=config.max_resolution,
            # In training mode megatron-core would crop the position grid at random, from the process-wide generator:
            # the crop would depend on rank and history, so that no resumed run could repeat it.
            force_cpe_eval_mode=True,
            pg_collection=groups,
        )
        self.max_tiles_per_chunk = TILES_AT_A_TIME
        self.keeps_pixels_only = False
        for name, values in (("pixel_mean", config.norm_mean), ("pixel_std", config.norm_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def encode(self, tiles_T3PP: Tensor) -> Tensor:
        """Features of tiles, in chunks of at most `max_tiles_per_chunk` tiles.

        Args:
            tiles_T3PP: [T, 3, P, P] uint8 RGB.

        Returns:
            [T, (G / 2)^2, 4 D] in the tower's dtype, visual tokens row by row.
        """
        if tiles_T3PP.shape[0] == 0:
            tokens = (self.img_h // self.patch_dim // _SHUFFLE) ** 2
            return self.class_token.new_zeros(0, tokens, _SHUFFLE**2 * self.visual_hidden_size)
        if self.keeps_pixels_only and torch.is_grad_enabled():
            encode = partial(checkpoint, self._encode_chunk, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([encode(chunk) for chunk in tiles_T3PP.split(TILES_ENCODED_AGAIN)])
        return torch.cat([self._encode_chunk(chunk) for chunk in tiles_T3PP.split(self.max_tiles_per_chunk)])

    def normalize(self, tiles_T3PP: Tensor) -> Tensor:
        """Pixels as the tower was trained on them: (x / 255 - mean) / std, in float32, then the tower's dtype."""
        scaled = tiles_T3PP.to(torch.float32) / 255.0
        return ((scaled - self.pixel_mean) / self.pixel_std).to(self.class_token.dtype)

    def _encode_chunk(self, tiles_T3PP: Tensor) -> Tensor:
        features = self(self.normalize(tiles_T3PP))
        return pixel_shuffle(features[:, self.class_token_len :])


def pixel_shuffle(features_TND: Tensor) -> Tensor:
    """Join every 2 x 2 square of patches into one token ("pixel shuffle v2" of InternVL, downsample ratio 0.5).

    Channels come in the order (row in the square, column in the square, channel). This is what the two views and
    transposes of the published processing amount to; a plain reshape of four consecutive patches is not the same.

    Args:
        features_TND: [T, G * G, D] patch features row by row.

    Returns:
        [T, (G / 2)^2, 4 D] row by row.
    """
    tiles, patches, width = features_TND.shape
    half = int(patches**0.5) // _SHUFFLE
    assert (half * _SHUFFLE) ** 2 == patches, f"{patches} patches are no square of even side"
    squares = features_TND.view(tiles, half, _SHUFFLE, half, _SHUFFLE, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(tiles, half * half, _SHUFFLE**2 * width)


def build_vision_tower(
    config: VisionConfig, layout: Layout, params_dtype: torch.dtype, backend: Backend
) -> VisionTower:
    """Build the tower, weights not yet initialised.

    Norms are modules of their own, not fused into the linear layers, so that parameter names do not depend on the
    backend: `decoder.layers.I.{input_layernorm,pre_mlp_layernorm}.{weight,bias}`.

    Args:
        config: Sizes.
        layout: Owner of the process groups; the tower is data-parallel over all ranks.
        params_dtype: Dtype of the weights.
        backend: Provider of the leaf modules.
    """
    transformer = vision_transformer_config(config, params_dtype)
    return VisionTower(config, transformer, _layer_spec(config, backend), layout.vision_groups)


def vision_transformer_config(config: VisionConfig, params_dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's config of the tower."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        activation_func=_activation(config.activation),
        normalization="LayerNorm",
        layernorm_epsilon=config.norm_eps,
        add_qkv_bias=True,
        # With a number here the block would own a final norm even though it is told not to post-process.
        mtp_num_layers=None,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        # Its `bias_activation_fusion=False` matters here: the fused bias + GELU is always the tanh form.
        **(COMMON_OPTIONS | {"add_bias_linear": True}),
    )


def _layer_spec(config: VisionConfig, backend: Backend) -> ModuleSpec:
    linear_in, linear_out = backend.column_linear, backend.row_linear
    mlp = MLPSubmodules(linear_fc1=linear_in, linear_fc2=linear_out)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_in, core_attention=backend.core_attention, linear_proj=linear_out
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=mlp, ffn_hidden_size=config.ffn_hidden_size),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """Exact (erf) GELU as in the published weights' own code, or megatron-core's fast tanh form."""
    forms: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh}
    return forms[name]
