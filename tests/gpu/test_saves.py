"""What a save costs a GPU, and Transformer Engine's fused Adam through a checkpoint, on one GPU under `te` in bf16."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from gpu_packs import random_pack

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.saving import Saver, save
from nemovl_train.config.schema import (
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProjectorConfig,
    TokenIds,
    VisionConfig,
)
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.step import train_step

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    name="every_kind_of_layer_narrow",
    language=LanguageConfig(
        hidden_size=1024,
        hybrid_pattern="M-M*-",
        num_attention_heads=8,
        ffn_hidden_size=4096,
        mamba_num_heads=32,
        mamba_head_dim=64,
        vocab_size=16384,
        base_vocab_size=16000,
    ),
    vision=VisionConfig(num_layers=2, hidden_size=320, num_attention_heads=4, ffn_hidden_size=1280),
    projector=ProjectorConfig(ffn_hidden_size=1024),
    tokens=TokenIds(image=16000, image_start=16001, image_end=16002, video=16009),
)
MIB = 1 << 20
SLAB = 64 * MIB  # host memory is taken in blocks of this size


@dataclass
class Trained:
    """A model and its optimizer, some steps into a run."""

    layout: Layout
    optimizers: Optimizers

    @classmethod
    def fresh(cls, layout: Layout, states: str, seed: int) -> "Trained":
        model = build_model(MODEL, layout, params_dtype=torch.bfloat16, seed=seed, draw_on=layout.device)
        return cls(layout, Optimizers(model, layout, OptimConfig(lr=1e-3, states=states), torch.bfloat16))

    def step(self, seed: int) -> None:
        pack = random_pack(MODEL, seed=seed, lengths=(700, 33, 1300), tiles=(2, 0, 4), seq_length=2048)
        assert train_step(self.optimizers, [pack], self.layout, lr=1e-3, divisor="pack").applied

    def update_with(self, seed: int) -> float | None:
        """An update with gradients that depend on the seed alone: kernels that sum in any order play no part."""
        generator = torch.Generator(self.layout.device).manual_seed(seed)
        self.optimizers.zero_grad()
        for side in self.optimizers.sides:
            for buffer in side.ddp.buffers:
                buffer.grad_data.normal_(0.0, 1e-3, generator=generator)
        return self.optimizers.step(1e-3)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.optimizers.model.named_parameters()}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the optimizers hold, as it lies in memory."""
        found = {}
        for side, inner in self._inner():
            parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
            for number, parameter in enumerate(parameters):
                for name, tensor in {**inner.state[parameter], "parameter": parameter}.items():
                    if isinstance(tensor, torch.Tensor):
                        found[f"{side}.{number}.{name}"] = tensor.detach().clone()
        return found

    def counts(self) -> set[int]:
        """Steps that the optimizers have counted."""
        return {int(group["step"]) for _, inner in self._inner() for group in inner.param_groups if group.get("params")}

    def _inner(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        for side in self.optimizers.sides:
            for number, chained in enumerate(getattr(side.optimizer, "chained_optimizers", [side.optimizer])):
                yield f"{side.name}.{number}", chained.optimizer


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.mark.parametrize("states", ["fp32", "bf16_moments"])
def test_a_save_stages_one_copy_and_leaves_the_gpu_peak_alone(layout, tmp_path, states, record):
    """Moments in bfloat16 are those of which Transformer Engine would make float32 copies for a checkpoint."""
    trained = Trained.fresh(layout, states, seed=1)
    for seed in range(2):
        trained.step(seed)

    def peak(action) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    without = peak(lambda: trained.step(2))
    pinned_before = torch.cuda.host_memory_stats()["active_bytes.current"]
    torch.cuda.reset_peak_host_memory_stats()
    held_before = torch.cuda.memory_allocated()
    saver = Saver(tmp_path, "test")
    options = {"model": trained.optimizers.model, "optimizer": trained.optimizers, "state": {}}

    def save_beside_steps() -> None:
        saver.start(1, **options)
        trained.step(2)  # the same pack: its loss takes as much memory
        saver.finish()

    started = peak(lambda: saver.start(0, **options))
    record(f"{states}: bytes on the GPU during the copy, over those before", started - held_before, 16 * MIB)
    assert started - held_before <= 16 * MIB
    saver.finish()
    beside = peak(save_beside_steps)
    record(f"{states}: GPU peak of a step beside a save over that of one without", beside / without, 1.0)
    assert beside <= without
    written = sum(path.stat().st_size for path in (sealed.step_folder(tmp_path, 1) / "sharded").glob("*.bin"))
    parameters = trained.optimizers.num_parameters()
    # bf16 weight; fp32 master weight and moments, or 16 bits of it and bf16 moments; A_log and D have no master weight.
    assert written >= {"fp32": 13.9, "bf16_moments": 7.9}[states] * parameters
    pinned = torch.cuda.host_memory_stats()["active_bytes.peak"] - pinned_before
    record(f"{states}: page-locked bytes over the file's, after two saves", pinned / written, 1 + 2 * SLAB / written)
    assert written <= saver.stage_bytes <= pinned <= written + 2 * SLAB


@pytest.mark.parametrize("states", ["fp32", "bf16_moments", "lean"])
def test_fused_adam_goes_on_exactly(layout, tmp_path, states, record):
    trained = Trained.fresh(layout, states, seed=1)
    from transformer_engine.pytorch.optimizers import FusedAdam

    assert all(isinstance(inner, FusedAdam) for _, inner in trained._inner())
    for seed in range(3):
        trained.step(seed)
    folder = save(tmp_path, 3, model=trained.optimizers.model, optimizer=trained.optimizers, state={}, run_id="test")
    expected_state, expected_count = trained.state(), trained.counts()
    other = Trained.fresh(layout, states, seed=99)
    forgetful = Trained.fresh(layout, states, seed=98)
    sealed.load(folder, model=other.optimizers.model, optimizer=other.optimizers)
    sealed.load(folder, model=forgetful.optimizers.model)  # the control: weights without moments
    found = other.state()
    assert found.keys() == expected_state.keys()
    assert [name for name, tensor in expected_state.items() if not torch.equal(tensor, found[name])] == []
    assert other.counts() == expected_count == {3}
    for step in range(2):
        norms = [each.update_with(step) for each in (trained, other, forgetful)]
        assert norms[0] is not None
        assert math.isfinite(norms[0])
        assert norms[0] == norms[1]
    expected, resumed, without = (each.weights() for each in (trained, other, forgetful))
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, resumed[name])]
    record(f"fused Adam, {states}: tensors that differ two updates after a resume", len(different), 0)
    assert different == []
    assert any(not torch.equal(tensor, without[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hashes_of_replicas_see_one_flipped_bit_on_the_gpu(dtype):
    """What `training/replicas.py` compares."""
    weight = torch.randn(1031, 517, device="cuda").to(dtype)
    before = torch.hash_tensor(weight).view(torch.int64)
    assert before.is_cuda
    assert int(before) == int(torch.hash_tensor(weight.clone()).view(torch.int64))
    for bit in (0, 6):
        for position in (0, 1, weight.nbytes - 1):
            flipped = weight.clone()
            flipped.view(-1).view(torch.uint8)[position].bitwise_xor_(1 << bit)
            assert int(torch.hash_tensor(flipped).view(torch.int64)) != int(before), (bit, position)
