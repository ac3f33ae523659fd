"""Tiny models of Transformers' own classes, and names that lead from the published (hub) layout to theirs.

Transformers renames tensors while it loads a folder; these few rules are that renaming, so that a test can copy
weights and compare gradients without writing files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config, RadioConfig, RadioModel

from nemovl_train.config.schema import ModelConfig, VisionConfig
from nemovl_train.convert.mapping import canonical_to_hf, hf_to_canonical

_RENAMES = (
    ("language_model.backbone.", "language_model.model."),
    ("mlp1.0.", "multi_modal_projector.layer_norm."),
    ("mlp1.1.", "multi_modal_projector.linear_1."),
    ("mlp1.3.", "multi_modal_projector.linear_2."),
    ("vision_model.radio_model.model.patch_generator.embedder.", "vision_model.embeddings.patch_projection."),
    ("vision_model.radio_model.model.patch_generator.pos_embed", "vision_model.embeddings.position_embedding"),
    ("vision_model.radio_model.model.patch_generator.cls_token.token", "vision_model.embeddings.cls_register_token"),
    ("vision_model.radio_model.model.blocks.", "vision_model.encoder.layer."),
)
_QKV = ("q_proj", "k_proj", "v_proj")
_NATIVE_ONLY = ("input_conditioner.", "summary_idxs", "layer_scale", "video_patch_projection")
"""Tensors that only the native classes have: constants, identities, and the video embedder of a later model."""


def to_native(hub: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and splits of the native classes, from those of a published vision-language folder."""
    native = {}
    for name, tensor in hub.items():
        for old, new in _RENAMES:
            name = name.replace(old, new) if name.startswith(old) else name
        if ".attn.qkv." in name:
            for part, rows in zip(_QKV, tensor.chunk(3), strict=True):
                native[name.replace(".attn.qkv.", f".attention.{part}.")] = rows
        else:
            native[name.replace(".attn.proj.", ".attention.o_proj.")] = tensor
    return native


def from_native(native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back, for gradients."""
    hub = {}
    for name, tensor in native.items():
        if name.startswith("vision_model.") and ".attention." in name:
            if ".k_proj." in name or ".v_proj." in name:
                continue
            if ".q_proj." in name:
                tensor = torch.cat([native[name.replace("q_proj", part)] for part in _QKV])
            name = name.replace(".attention.q_proj.", ".attn.qkv.").replace(".attention.o_proj.", ".attn.proj.")
        for old, new in _RENAMES:
            name = name.replace(new, old) if name.startswith(new) else name
        hub[name] = tensor
    return hub


def copy_weights(canonical: Mapping[str, Tensor], config: ModelConfig, kind: str, model: torch.nn.Module) -> None:
    """Copy our weights into a native model; each parameter that stands for one of ours must be covered.

    Args:
        canonical: Our state dict.
        config: Sizes.
        kind: `vlm`, or `vision` for a `RadioModel`.
        model: Native model.
    """
    prefix = "vision_model." if kind == "vision" else ""
    hub = canonical_to_hf(canonical, config, kind, constants={})
    native = to_native({prefix + name: tensor for name, tensor in hub.items()})
    missing, unexpected = model.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in native.items()}, strict=False
    )
    assert not unexpected, unexpected
    assert not [name for name in missing if not any(word in name for word in _NATIVE_ONLY)], missing


def canonical_gradients(model: torch.nn.Module, config: ModelConfig, kind: str) -> dict[str, Tensor]:
    """Gradients of a native model under our names, fused like our tensors."""
    prefix = "vision_model." if kind == "vision" else ""
    native = {
        prefix + name: parameter.grad
        for name, parameter in model.named_parameters()
        if not any(word in name for word in _NATIVE_ONLY)
    }
    hub = {name.removeprefix(prefix): tensor for name, tensor in from_native(native).items()}
    return hf_to_canonical(hub, config, kind)


def radio_config(config: VisionConfig) -> RadioConfig:
    """The same tower for Transformers.

    Trap: megatron-core's fast GELU is the tanh form, the published code's is exact; both sides are told which one.
    """
    return RadioConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        mlp_ratio=config.ffn_hidden_size / config.hidden_size,
        patch_size=config.patch_size,
        max_img_size=config.max_resolution,
        num_cls_tokens=config.prefix_tokens // 2,
        num_registers=config.prefix_tokens - config.prefix_tokens // 2,
        summary_idxs=[0],
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        layer_norm_eps=config.norm_eps,
        norm_mean=list(config.norm_mean),
        norm_std=list(config.norm_std),
        attn_implementation="eager",
    )


def tiny_radio(config: VisionConfig) -> RadioModel:
    """A native tower with its own random weights, in training mode like ours."""
    return RadioModel(radio_config(config)).train()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp_min(1e-30))


def tiny_omni(config: ModelConfig) -> NemotronH_Omni_Reasoning_V3:
    """The native vision-language class in the shape of our model, without audio and with a dense layer pattern.

    Traps handled here:
    - The native Mamba mixer clamps dt from below at `time_step_min`, whatever `time_step_limit` says; the released
      model's code and megatron-core do not clamp.
    - The video embedder of a later model cannot be turned off; it is built and never used.
    - `get_image_features` casts pixels to the tower config's dtype, which `from_config` leaves unset.
    """
    language = config.language
    vision = radio_config(config.vision)
    vision.video_temporal_patch_size = 2
    vision.video_patch_dim = 2 * vision.patch_dim
    model = NemotronH_Omni_Reasoning_V3(
        NemotronH_Omni_Reasoning_V3_Config(
            vision_config=vision,
            text_config={
                "model_type": "nemotron_h",
                "hidden_size": language.hidden_size,
                "hybrid_override_pattern": language.hybrid_pattern,
                "num_attention_heads": language.num_attention_heads,
                "num_key_value_heads": language.num_query_groups,
                "head_dim": language.head_dim,
                "intermediate_size": language.ffn_hidden_size,
                "mamba_num_heads": language.mamba_num_heads,
                "mamba_head_dim": language.mamba_head_dim,
                "ssm_state_size": language.mamba_state_dim,
                "n_groups": language.mamba_num_groups,
                "chunk_size": language.chunk_size,
                "conv_kernel": language.conv_kernel,
                "layer_norm_epsilon": language.norm_eps,
                "vocab_size": language.vocab_size,
            },
            audio_config=None,
            projector_hidden_size=config.projector.ffn_hidden_size,
            vision_hidden_size=config.vision.hidden_size,
            image_token_id=config.tokens.image,
            attn_implementation="eager",
        )
    )
    model.vision_model.config.dtype = torch.float32
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model.train()


def native_inputs(config: ModelConfig, ids_S: Tensor, tiles_T3PP: Tensor) -> dict[str, Tensor]:
    """Inputs of the native class: it takes normalised pixels as flattened patches (channel, row, column)."""
    vision = config.vision
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vision.norm_mean, vision.norm_std))
    pixels = (tiles_T3PP / 255 - mean) / std
    side, patch = vision.tile_size // vision.patch_size, vision.patch_size
    patches = pixels.view(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch * patch)
    return {
        "input_ids": ids_S[None],
        "pixel_values": patches,
        "image_grid_hw": torch.tensor([[side, side]]).expand(len(tiles_T3PP), 2),
    }
