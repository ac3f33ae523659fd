"""The JSON documents of an exported folder, as pure functions of a `ModelConfig`.

Field names and values follow the released `nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16` folder as public engines read it
(vLLM `nano_nemotron_vl`, SGLang `nano_nemotron_vl`, NVIDIA-NeMo/Megatron-Bridge `nemotron_vl`), and Transformers' own
classes `NemotronHConfig`, `RadioConfig`, `NemotronH_Omni_Reasoning_V3_Config`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from nemovl_train.config.schema import LanguageConfig, ModelConfig, VisionConfig
from nemovl_train.convert import llama as llama_layout
from nemovl_train.convert.names import is_llama
from nemovl_train.exceptions import ConversionError

VLM_ARCHITECTURE = "NemotronH_Nano_VL_V2"
LANGUAGE_ARCHITECTURE = "NemotronHForCausalLM"
VISION_ARCHITECTURES = ("RadioModel", "RADIOModel")
OMNI_ARCHITECTURE = "NemotronH_Omni_Reasoning_V3"
# Engines know these towers by name: (width, layers, heads, feed-forward width). Source: timm's vision_transformer.
TIMM_SIZES = {
    "vit_small_patch16_224": (384, 12, 6, 1536),
    "vit_base_patch16_224": (768, 12, 12, 3072),
    "vit_large_patch16_224": (1024, 24, 16, 4096),
    "vit_huge_patch16_224": (1280, 32, 16, 5120),
}
VISION_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
PIXEL_SHUFFLE = 0.5
PROJECTOR_EPS = 1e-5
# Transformers' Omni class always builds an embedder for pairs of video frames; the released V2 layout has none.
OMNI_VIDEO_FRAMES = 2


@dataclass(frozen=True, kw_only=True)
class MediaBudget:
    """How images and videos become tiles and tokens, as `preprocessor_config.json` and `config.json` say it.

    The released folder has only the image fields; the others take the values of arXiv 2511.03929, section 3.6.

    Attributes:
        max_num_tiles: Largest tile grid of an image.
        use_thumbnail: A whole-image tile follows a grid of more than one tile.
        video_fps: Frames sampled per second of video.
        video_max_frames: Most frames of one video.
        video_pruning_rate: Share of each video's visual tokens that is dropped; a field of `config.json`.
    """

    max_num_tiles: int = 12
    use_thumbnail: bool = True
    video_fps: float = 2.0
    video_max_frames: int = 128
    video_pruning_rate: float = 0.0


RELEASED_MEDIA = MediaBudget()
PRUNING = "video_pruning_rate"
"""The one field of a media budget that is in `config.json`."""


def vlm_config(config: ModelConfig, *, dtype: str, media: MediaBudget) -> dict[str, Any]:
    """`config.json` of a vision-language folder.

    Raises:
        ConversionError: A setting that the layout has no field for.
    """
    architecture = _vlm_architecture(config)
    tokens, vision = config.tokens, config.vision
    return {
        "_name_or_path": config.name,
        "architectures": [architecture],
        "model_type": architecture,
        "is_composition": True,
        "torch_dtype": dtype,
        "llm_config": language_config(config, dtype=dtype),
        "vision_config": hub_vision_config(vision, dtype=dtype),
        "force_image_size": vision.tile_size,
        "patch_size": vision.patch_size,
        "downsample_ratio": PIXEL_SHUFFLE,
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "template": None,
        "vit_hidden_size": vision.hidden_size,
        "projector_hidden_size": config.projector.ffn_hidden_size,
        "use_thumbnail": media.use_thumbnail,
        "norm_mean": list(vision.norm_mean),
        "norm_std": list(vision.norm_std),
        "img_context_token": "<image>",
        "img_context_token_id": tokens.image,
        "img_start_token": "<img>",
        "img_start_token_id": tokens.image_start,
        "img_end_token": "</img>",
        "img_end_token_id": tokens.image_end,
        "video_context_token": "<video>",
        "video_context_token_id": tokens.video,
        "video_pruning_rate": media.video_pruning_rate,
        "max_sequence_length": config.language.max_position,
        "attn_implementation": "flash_attention_2",
    }


def _vlm_architecture(config: ModelConfig) -> str:
    """The layout's name, where readers of it build the projector that the model has."""
    if config.projector.norm_eps != PROJECTOR_EPS:
        eps = config.projector.norm_eps
        raise ConversionError(f"projector.norm_eps={eps}: readers of this layout use {PROJECTOR_EPS}")
    llama = is_llama(config.language)
    expected = ("layernorm", "gelu", True) if llama else ("rmsnorm", "squared_relu", False)
    form = (config.projector.norm, config.projector.activation, config.projector.bias)
    if form != expected:
        raise ConversionError(
            f"projector with norm, activation, bias {form}: readers of the layout that this language model has build "
            f"{expected}"
        )
    return llama_layout.VLM_ARCHITECTURE if llama else VLM_ARCHITECTURE


def language_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """`config.json` of a text-only folder, and `llm_config` of a vision-language one."""
    lm = config.language
    if is_llama(lm):
        return llama_layout.llama_config(config, dtype=dtype)
    return {
        "_name_or_path": config.name,
        "architectures": [LANGUAGE_ARCHITECTURE],
        "model_type": "nemotron_h",
        "torch_dtype": dtype,
        "vocab_size": lm.vocab_size,
        "hidden_size": lm.hidden_size,
        "num_hidden_layers": lm.num_layers,
        "hybrid_override_pattern": lm.hybrid_pattern,
        **_attention_and_mlp(lm),
        **_mamba(lm),
        "layer_norm_epsilon": lm.norm_eps,
        "norm_eps": lm.norm_eps,
        "initializer_range": lm.init_std,
        "max_position_embeddings": lm.max_position,
        "tie_word_embeddings": False,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "hidden_dropout": 0.0,
        "num_logits_to_keep": 1,
        "use_cache": True,
        "bos_token_id": config.tokens.bos,
        "eos_token_id": config.tokens.eos,
        "pad_token_id": config.tokens.pad,
    }


def _attention_and_mlp(lm: LanguageConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": lm.num_attention_heads,
        "num_key_value_heads": lm.num_query_groups,
        "head_dim": lm.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "intermediate_size": lm.ffn_hidden_size,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "use_bias": False,
    }


def _mamba(lm: LanguageConfig) -> dict[str, Any]:
    return {
        "mamba_num_heads": lm.mamba_num_heads,
        "mamba_head_dim": lm.mamba_head_dim,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "ssm_state_size": lm.mamba_state_dim,
        "n_groups": lm.mamba_num_groups,
        "conv_kernel": lm.conv_kernel,
        "use_conv_bias": True,
        "chunk_size": lm.chunk_size,
        "expand": 2,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        # Written as Python's json writes infinity; every reader of this layout is Python.
        "time_step_limit": [0.0, float("inf")],
    }


def prefix_split(prefix_tokens: int) -> tuple[int, int]:
    """(summary tokens, registers) of a tower. Only the sum matters to a VLM, which drops them all."""
    summary = min(4, max(1, prefix_tokens - 1))
    return summary, prefix_tokens - summary


def timm_name(vision: VisionConfig) -> str:
    """Name by which engines look up the tower's sizes; a size of our own gets a name that none of them knows."""
    sizes = (vision.hidden_size, vision.num_layers, vision.num_attention_heads, vision.ffn_hidden_size)
    for name, known in TIMM_SIZES.items():
        if known == sizes and vision.patch_size == 16:
            return name
    return f"vit_{vision.hidden_size}x{vision.num_layers}_patch{vision.patch_size}"


def hub_vision_config(vision: VisionConfig, *, dtype: str) -> dict[str, Any]:
    """`vision_config` of a vision-language folder: the tower's hub config, plus its sizes spelled out.

    Engines take sizes from `args.model`, and the prefix from `teachers` and `register_multiple`
    (NVlabs/RADIO `cls_token.py`: registers = multiple - summary % multiple).
    """
    summary, registers = prefix_split(vision.prefix_tokens)
    args: dict[str, Any] = {
        "model": timm_name(vision),
        "cpe_max_size": vision.max_resolution,
        "cls_token_per_teacher": True,
        "teachers": [{"name": f"teacher_{i}", "use_summary": i < 2} for i in range(summary)],
        "register_multiple": vision.prefix_tokens if registers else None,
    }
    return {
        **native_vision_config(vision, dtype=dtype),
        "architectures": ["RADIOModel"],
        "args": args,
        "version": "nemovl",
        "max_resolution": vision.max_resolution,
        "preferred_resolution": [vision.tile_size, vision.tile_size],
        "adaptor_names": None,
        "adaptor_configs": {},
        "vitdet_window_size": None,
        "feature_normalizer_config": None,
    }


def native_vision_config(vision: VisionConfig, *, dtype: str) -> dict[str, Any]:
    """Fields of Transformers' `RadioConfig`."""
    summary, registers = prefix_split(vision.prefix_tokens)
    return {
        "architectures": ["RadioModel"],
        "model_type": "radio",
        "torch_dtype": dtype,
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        "hidden_act": VISION_ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "patch_size": vision.patch_size,
        "image_size": vision.tile_size,
        "max_img_size": vision.max_resolution,
        "num_cls_tokens": summary,
        "num_registers": registers,
        "summary_idxs": list(range(min(2, vision.prefix_tokens))),
        "norm_mean": list(vision.norm_mean),
        "norm_std": list(vision.norm_std),
    }


def omni_config(config: ModelConfig, *, dtype: str, media: MediaBudget = RELEASED_MEDIA) -> dict[str, Any]:
    """Config with which Transformers' native Omni class opens the same weights (it has no class for V2 itself)."""
    vision = native_vision_config(config.vision, dtype=dtype) | {"video_temporal_patch_size": OMNI_VIDEO_FRAMES}
    return {
        "architectures": [OMNI_ARCHITECTURE],
        "model_type": "nemotron_h_omni",
        "torch_dtype": dtype,
        "text_config": language_config(config, dtype=dtype),
        "vision_config": vision,
        "audio_config": None,
        "force_image_size": config.vision.tile_size,
        "downsample_ratio": PIXEL_SHUFFLE,
        "projector_hidden_size": config.projector.ffn_hidden_size,
        "vision_hidden_size": config.vision.hidden_size,
        "video_pruning_rate": media.video_pruning_rate,
        "video_temporal_patch_size": OMNI_VIDEO_FRAMES,
        "image_token_id": config.tokens.image,
        "video_token_id": config.tokens.video,
    }


def preprocessor_config(vision: VisionConfig, media: MediaBudget) -> dict[str, Any]:
    """`preprocessor_config.json`: tiling and normalisation of images, frames of videos."""
    budget = {name: value for name, value in asdict(media).items() if name != PRUNING}
    return {
        "image_processor_type": "NemotronNanoVLV2ImageProcessor",
        "processor_class": "NemotronNanoVLV2Processor",
        "image_size": vision.tile_size,
        "patch_size": vision.patch_size,
        **budget,
        "downsample_ratio": PIXEL_SHUFFLE,
        "do_rescale": True,
        "norm_mean": list(vision.norm_mean),
        "norm_std": list(vision.norm_std),
    }


def processor_config() -> dict[str, Any]:
    """`processor_config.json`."""
    return {"processor_class": "NemotronNanoVLV2Processor"}


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """`generation_config.json`: greedy, stopping at the end-of-turn marker."""
    return {
        "bos_token_id": config.tokens.bos,
        "eos_token_id": [config.tokens.eos],
        "pad_token_id": config.tokens.pad,
        "do_sample": False,
    }
