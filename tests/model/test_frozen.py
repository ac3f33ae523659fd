"""Frozen parts cost no products for gradients of their weights: matrix FLOPs counted by PyTorch against sizes alone."""

import sys
from pathlib import Path

import pytest
import torch
from small_vlm import CONFIG
from torch.utils.flop_counter import FlopCounterMode

from nemovl_train.config.adapters import linears
from nemovl_train.config.schema import RecomputeConfig
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

from gpu_packs import random_pack

LENGTH, TILES = 256, 6


def backward_flops(layout, train, recompute="none"):
    """Of the backward pass alone."""
    model = build_model(
        CONFIG, layout, params_dtype=torch.float32, backend="torch", recompute=RecomputeConfig(language=recompute)
    )
    model.freeze(train)
    loss = model(
        PackBatch.from_pack(random_pack(CONFIG, lengths=(70, 33, 130), tiles=(2, 0, 4), seq_length=LENGTH), layout)
    ).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def products(part, rows):
    """Multiplications and additions of one product a linear layer of a part, over so many rows."""
    return sum(2 * rows * linear.inputs * linear.outputs for linear in linears(CONFIG) if linear.part == part)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_frozen_language_model_takes_no_weight_gradients(layout, recompute):
    trained = backward_flops(layout, ("projector", "language"), recompute)
    frozen = backward_flops(layout, ("projector",), recompute)
    # The head's is added in place, which PyTorch's counter leaves out.
    assert trained - frozen == products("language", LENGTH)


def test_frozen_tower_has_no_backward_pass(layout):
    with_projector = backward_flops(layout, ("projector",))
    with_tower = backward_flops(layout, ("vision", "projector"))
    tokens = (CONFIG.vision.tile_size // CONFIG.vision.patch_size) ** 2 + CONFIG.vision.prefix_tokens
    # Weight and input gradients of every linear layer, and of the patch embedding and attention besides.
    assert with_tower - with_projector > 2 * 0.95 * products("vision", TILES * tokens)
    own = 2 * products("projector", TILES * CONFIG.tokens_per_tile)
    # The projector's first linear needs no gradient of its input, and the language model's are inputs' alone.
    assert with_projector < own + products("language", LENGTH) * 2.5
