"""A tiny model whose sizes are all different where they can be, and random tensors for it."""

import torch
from torch import Tensor

from nemovl_train.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, TokenIds, VisionConfig
from nemovl_train.convert.names import Precision, table

CONFIG = ModelConfig(
    name="test-tiny",
    language=LanguageConfig(
        hidden_size=32,
        hybrid_pattern="M-M*-M-",
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        ffn_hidden_size=48,
        mamba_num_heads=8,
        mamba_head_dim=8,
        mamba_state_dim=16,
        mamba_num_groups=2,
        chunk_size=16,
        max_position=512,
        vocab_size=112,
        base_vocab_size=96,
    ),
    vision=VisionConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=3,
        ffn_hidden_size=96,
        tile_size=64,
        max_resolution=128,
        prefix_tokens=8,
    ),
    projector=ProjectorConfig(ffn_hidden_size=40),
    tokens=TokenIds(image=96, image_start=97, image_end=98, video=105, pad=0, bos=1, eos=12),
)


def random_tensors(
    config: ModelConfig = CONFIG, kind: str = "vlm", *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Canonical tensors whose every value matters: no zeros, no ones, norms and states included."""
    generator = torch.Generator().manual_seed(7)
    out = {}
    for entry in table(config, kind):
        value = torch.randn(entry.shape, generator=generator) * 0.2
        if len(entry.shape) == 1 and not entry.ours.endswith("bias"):
            value = value + 1.0
        out[entry.ours] = value if entry.precision is Precision.STATE else value.to(dtype)
    return out
