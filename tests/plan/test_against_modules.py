"""What plans count, counted in real modules: bytes of weights, gradients and states, and tensors kept for backward."""

from dataclasses import replace

import pytest
import torch

from nemovl_train.config.schema import (
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    TrainerConfig,
    VisionConfig,
)
from nemovl_train.model.vlm import build_model
from nemovl_train.plan.load import Grid, PackLoad
from nemovl_train.plan.memory import memory
from nemovl_train.plan.policy import Policy

TOKENS = 256
SIZES = ModelConfig(
    language=LanguageConfig(
        hidden_size=64,
        hybrid_pattern="M-*-",
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        ffn_hidden_size=160,
        mamba_num_heads=8,
        mamba_head_dim=16,
        mamba_state_dim=16,
        mamba_num_groups=2,
        chunk_size=32,
        vocab_size=272,
        base_vocab_size=256,
    ),
    vision=VisionConfig(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        ffn_hidden_size=192,
        tile_size=64,
        max_resolution=256,
        prefix_tokens=4,
    ),
)
LOAD = PackLoad(seq_length=TOKENS, documents=(TOKENS,), samples=1, tiles=2, head_tokens=TOKENS)


TRAIN_ALL = RunConfig(model=SIZES, precision=PrecisionConfig(params="bf16"))


def kept_numbers(module: torch.nn.Module, run) -> int:
    """float32 numbers of distinct tensors that autograd keeps while `run` goes forward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    del out
    return sum(kept.values())


@pytest.fixture(scope="module")
def model(layout):
    return build_model(SIZES, layout, params_dtype=torch.float32, backend="torch")


def test_mlp_layer_keeps_what_is_planned(model):
    layer, x = model.language_model.decoder.layers[1], torch.randn(TOKENS, 1, 64, requires_grad=True)
    only_mlp = replace(SIZES, language=replace(SIZES.language, hybrid_pattern="-"))
    planned = memory(replace(TRAIN_ALL, model=only_mlp), Grid(), LOAD).activations / 2
    # Without a fused kernel the norm keeps the normalised input as well.
    assert kept_numbers(layer, lambda: layer(x)) == pytest.approx(TOKENS * 64 + planned, rel=0.01)


def test_tower_and_projector_keep_what_is_planned(model):
    tiles = torch.zeros(LOAD.tiles, 3, 64, 64, dtype=torch.uint8)
    tower = kept_numbers(model, lambda: model.vision_model.encode(tiles)) - tiles.numel()  # the pixels as floats
    features = torch.randn(LOAD.tiles, SIZES.tokens_per_tile, 4 * 48, requires_grad=True)
    projector = kept_numbers(model, lambda: model.projector(features))
    everything = memory(TRAIN_ALL, Grid(), LOAD).vision
    recomputed = memory(TRAIN_ALL, Grid(), LOAD, Policy(tower_recompute="full")).vision
    # What recomputation saves is all of a block but its input; it adds one block's tensors to those at work.
    planned_tower = 2 * LOAD.tiles * 20 * 48 * 16
    assert (everything - recomputed) / 2 == pytest.approx(planned_tower * 15 / 16 * (1 - 1 / 2))
    assert tower == pytest.approx(planned_tower, rel=0.02)
    frozen = memory(replace(TRAIN_ALL, trainer=TrainerConfig(train=("projector",))), Grid(), LOAD).vision
    assert (everything - frozen) / 2 == pytest.approx(planned_tower)
    live = LOAD.tiles * 20 * 48 * 10
    assert projector == pytest.approx(frozen / 2 - live - LOAD.tiles * SIZES.tokens_per_tile * 64, rel=0.01)


def test_weights_gradients_and_states_are_those_of_the_optimizer(layout):
    from nemovl_train.training.optimizer import Optimizers

    model = build_model(SIZES, layout, params_dtype=torch.float32, backend="torch")
    model.freeze(train=("projector", "language"))
    optimizers = Optimizers(model, layout, OptimConfig(), torch.float32)
    for side in optimizers.sides:
        for parameter in side.ddp.module.parameters():
            if parameter.requires_grad:
                parameter.main_grad.fill_(1.0)
    optimizers.step(1e-3)
    config = RunConfig(model=SIZES, trainer=TrainerConfig(train=("projector", "language")))
    planned = memory(config, Grid(), LOAD)
    assert planned.weights == sum(p.numel() * 4 for p in model.parameters())
    # Buffers are padded to whole shards: parts in ten thousand at this size.
    buffers = sum(buffer.grad_data.nbytes for side in optimizers.sides for buffer in side.ddp.buffers)
    assert planned.gradients == pytest.approx(buffers, rel=1e-3)
    held = sum(
        value.nbytes
        for side in optimizers.sides
        for state in side.optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    assert planned.optimizer == pytest.approx(held, rel=1e-3)


def test_weights_that_fp8_keeps_are_those_of_the_layers_that_run_in_it(model):
    """Two bytes for each number of a linear layer's weight inside the modules that the model wraps."""
    from nemovl_train.model.vlm import _fp8_modules

    precision = PrecisionConfig(params="bf16", fp8="blockwise", bf16_layers=1, bf16_blocks=0)
    ends = ("linear_fc1", "linear_fc2", "linear_qkv", "linear_proj", "in_proj", "out_proj")
    held = sum(
        part.weight.numel()
        for module in _fp8_modules(model, precision)
        for name, part in module.named_modules()
        if name.endswith(ends)
    )
    quantized = memory(replace(TRAIN_ALL, precision=precision), Grid(), LOAD).weights
    assert quantized - memory(TRAIN_ALL, Grid(), LOAD).weights == 2 * held > 0
