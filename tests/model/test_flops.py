"""Parameter counts against real modules and published totals; FLOPs against hand counts and stated identities."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny import TINY

from nemovl_train.config.schema import PARTS, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from nemovl_train.model.flops import count_parameters, training_flops
from nemovl_train.model.vlm import build_model

# Totals of the published tensors, the language model counted with the rows of the text-only model. Sum: 13.17e9.
PUBLISHED = {"language": 12_310_001_152, "vision": 651_653_120, "projector": 209_720_320}
BASE_ROWS = 131_072


def test_published_totals():
    config = ModelConfig()
    config = replace(config, language=replace(config.language, vocab_size=BASE_ROWS))
    assert count_parameters(config) == PUBLISHED
    assert count_parameters(replace(config, parts=("vision",))) == {"vision": PUBLISHED["vision"]}


def test_counts_equal_the_real_modules(layout):
    model = build_model(TINY, layout, params_dtype=torch.float32, backend="torch")
    real = {part: sum(p.numel() for p in module.parameters()) for part, module in model.part_modules().items()}
    assert real == count_parameters(TINY)


def test_training_is_three_forward_passes_and_frozen_parts_cost_less():
    shape = {"document_lengths": [100, 28], "num_tiles": 3, "head_tokens": 40}
    forward = training_flops(TINY, **shape, train=())
    full = training_flops(TINY, **shape, train=PARTS)
    warmup = training_flops(TINY, **shape, train=("projector",))
    assert full.language == 3 * forward.language
    assert full.projector == 3 * forward.projector
    # The patch embedding (768 pixels to the tower's width, 16 patches a tile) has no input gradient to compute.
    assert full.vision == 3 * forward.vision - 3 * 16 * 2 * 768 * TINY.vision.hidden_size
    assert warmup.vision == forward.vision
    assert warmup.projector == full.projector
    assert warmup.mlp == 2 * forward.mlp
    assert warmup.head == 2 * forward.head
    assert 2 * forward.attention < warmup.attention < full.attention
    assert training_flops(TINY, **shape | {"num_tiles": 0}, train=("projector",)).language == forward.language


def test_attention_counts_documents_not_the_pack():
    def attention(*lengths: int) -> float:
        return training_flops(TINY, document_lengths=lengths, num_tiles=0, head_tokens=0, train=()).attention

    size = TINY.language
    core = 2 * size.num_attention_heads * size.head_dim  # half of 4 x heads x width: causal
    assert attention(96, 32) - attention(64, 64) == core * (96**2 + 32**2 - 2 * 64**2)


def test_hand_count_of_one_layer_of_each_kind():
    config = ModelConfig(
        language=LanguageConfig(
            hidden_size=2,
            hybrid_pattern="M*-",
            num_attention_heads=2,
            num_query_groups=1,
            head_dim=3,
            ffn_hidden_size=7,
            mamba_num_heads=2,
            mamba_head_dim=4,
            mamba_state_dim=5,
            mamba_num_groups=1,
            conv_kernel=4,
            chunk_size=8,
            vocab_size=11,
        ),
        vision=VisionConfig(
            num_layers=1,
            hidden_size=4,
            num_attention_heads=1,
            ffn_hidden_size=6,
            tile_size=32,
            max_resolution=32,
            prefix_tokens=1,
        ),
        projector=ProjectorConfig(ffn_hidden_size=3),
    )
    flops = training_flops(config, document_lengths=[10], num_tiles=1, head_tokens=2, train=())
    rows, channels = 8 + 8 + 2 * 5 + 2, 8 + 2 * 5
    scan = 2 * 5 * 8 + 2 * 8 * 8 + 2 * (2 * 8 * 5)
    assert flops.mamba == 10 * (2 * 2 * rows + 2 * 8 * 2 + 2 * 4 * channels + scan)
    assert flops.attention == 10 * (2 * 2 * 12 + 2 * 6 * 2) + 2 * 6 * 10**2
    assert flops.mlp == 10 * (2 * 2 * 7 * 2)
    assert flops.head == 2 * (2 * 2 * 11)
    assert flops.vision == 5 * 2 * (4 * 16 + 2 * 4 * 6) + 4 * 5 * 5 * 4 + 4 * 2 * 768 * 4
    assert flops.projector == 1 * 2 * (16 * 3 + 3 * 2)
    swiglu = replace(config, language=replace(config.language, activation="swiglu"))
    gated = training_flops(swiglu, document_lengths=[10], num_tiles=1, head_tokens=2, train=())
    assert gated.mlp == pytest.approx(1.5 * flops.mlp)


def test_released_size_at_16k():
    """73.5 GFLOP a token for one 16,384-token document: six per parameter outside the embedding, scan and attention."""
    config = ModelConfig()
    config = replace(config, language=replace(config.language, vocab_size=BASE_ROWS))
    flops = training_flops(config, document_lengths=[16384], num_tiles=0, head_tokens=16384)
    assert flops.total / 16384 == pytest.approx(73.53e9, rel=1e-3)
    per_parameter = 6 * (PUBLISHED["language"] - BASE_ROWS * 5120)
    assert 1.03 < flops.total / 16384 / per_parameter < 1.06


def test_counts_need_no_torch():
    code = "import sys, nemovl_train.model.flops; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
