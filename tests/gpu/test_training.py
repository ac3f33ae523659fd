"""Training steps under `te` in bf16 on one GPU, and a checkpoint that moves between the backends."""

import math

import pytest
import torch
from gpu_packs import random_pack

from nemovl_train.checkpoint import saving, sealed
from nemovl_train.config.schema import LanguageConfig, ModelConfig, OptimConfig, ParallelConfig, TokenIds, VisionConfig
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.step import train_step

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    name="one_layer_of_each_kind",
    language=LanguageConfig(hybrid_pattern="M-M*-", vocab_size=16384, base_vocab_size=16000),
    vision=VisionConfig(num_layers=2),
    # A short vocabulary: drawing 132,096 rows of initial weights would take longer than the training.
    tokens=TokenIds(image=16000, image_start=16001, image_end=16002, video=16009),
)
STEPS = 12


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


def test_te_learns_a_repeated_batch_and_its_checkpoint_loads_in_torch(layout, tmp_path, record):
    model = build_model(MODEL, layout, params_dtype=torch.bfloat16, backend="te")
    model.freeze(train=("vision", "projector", "language"))
    optim = OptimConfig(lr=1e-4, weight_decay=0.01)
    optimizers = Optimizers(model, layout, optim, torch.bfloat16)
    shapes = {"lengths": (700, 33, 1300), "tiles": (2, 0, 4), "seq_length": 2048}
    packs = [random_pack(MODEL, seed=seed, **shapes) for seed in range(2)]
    losses = []
    for _ in range(STEPS):
        result = train_step(optimizers, packs, layout, lr=optim.lr, divisor="pack")
        assert result.applied
        losses.append(result.loss)
    # Independent uniform tokens: no better guess than the vocabulary until the batch is learnt by heart.
    assert abs(losses[0] - math.log(MODEL.language.vocab_size)) < 2.0
    record("te bf16, loss of a repeated batch, last step over first", losses[-1] / losses[0], 0.5)
    assert losses[-1] < 0.5 * losses[0]

    folder = saving.save(tmp_path, STEPS, model=model, optimizer=None, state={}, run_id="test")
    other = build_model(MODEL, layout, params_dtype=torch.bfloat16, backend="torch", seed=99)
    sealed.load(folder, model=other)
    trained, loaded = dict(model.named_parameters()), dict(other.named_parameters())
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
