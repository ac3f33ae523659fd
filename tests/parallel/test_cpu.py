"""Every name that `parallel/cpu.py` replaces: megatron-core fails, or silently does wrong, without it.

When one of these tests stops failing inside `restored`, megatron-core no longer needs that replacement: remove it.
"""

import pytest
import torch
from torch import nn

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.parallel import cpu
from nemovl_train.parallel.layout import Layout

# isort: split
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    _get_empty_tensor_for_exchange,
    exchange_loaded_tensors_gather_rounds,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
SHARD = ("w", (0,), None)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced when CUDA is there")


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


class Toy(nn.Module):
    """The least that megatron-core's trainer takes for a model."""

    def __init__(self):
        super().__init__()
        self.config = TransformerConfig(
            num_layers=1, hidden_size=4, num_attention_heads=1, gradient_accumulation_fusion=False
        )
        self.weight = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.model_type = ModelType.encoder_or_decoder

    def forward(self, x):
        return (x * self.weight + self.bias).sum()

    def set_input_tensor(self, tensor):
        pass

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {f"{prefix}weight": ShardedTensor.from_rank_offsets(f"{prefix}weight", self.weight)}


def wrap(layout):
    options = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    toy = Toy()
    return DistributedDataParallel(toy.config, options, toy, pg_collection=layout.language_groups)


def make_optimizer(layout, model):
    options = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=1.0)
    return get_megatron_optimizer(options, [model], use_gloo_process_groups=False, pg_collection=layout.language_groups)


def reduce_gradients(layout):
    model = wrap(layout)
    model(torch.ones(4)).backward()
    model.finish_grad_sync()


def run_schedule(layout):
    forward_backward_no_pipelining(
        forward_step_func=lambda data, model: (model(next(data)), lambda loss: (loss, torch.tensor(4), {})),
        data_iterator=iter([torch.ones(4)]),
        model=Toy(),
        num_microbatches=1,
        seq_length=4,
        micro_batch_size=1,
        pg_collection=layout.language_groups,
    )


def fork_is_isolated(layout):
    """Random numbers drawn inside the tracker's fork leave the numbers outside alone."""
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    inside_state = tracker.get_states()["model-parallel-rng"].clone()
    with tracker.fork():
        assert torch.equal(torch.get_rng_state(), inside_state)
        torch.rand(2)
    assert torch.equal(torch.rand(2), expected)


def recompute(layout):
    x = torch.ones(3, requires_grad=True)
    tensor_parallel.checkpoint(lambda y: (y * torch.rand(3)).sum(), False, x).backward()


def save_checkpoint(layout, folder):
    dist_checkpointing.save({"model": Toy().sharded_state_dict()}, str(folder))


def load_optimizer_state(layout):
    """What loading a checkpoint does for every parameter, after the step count."""
    model = wrap(layout)
    optimizer = make_optimizer(layout, model).chained_optimizers[0]
    optimizer.state_dict()
    with torch.no_grad():
        states = {key: torch.ones(4) for key in ("param", "exp_avg", "exp_avg_sq")}
        optimizer._set_main_param_and_optimizer_states(model.module.weight, states)


def steps_are_separate(layout):
    """After a load, every parameter counts its own steps."""
    optimizer = make_optimizer(layout, wrap(layout)).chained_optimizers[0]
    optimizer.load_state_dict(optimizer.state_dict())
    steps = [state["step"] for state in optimizer.optimizer.state.values()]
    assert len(steps) > 1
    assert len({id(step) for step in steps}) == len(steps)


def send_shard(layout):
    """A rank's side of a parallel load: it read a shard that another rank needs too."""
    shard = ShardedTensor.from_rank_offsets("w", torch.ones(2))
    plan = ShardDistribution({SHARD: 0}, {SHARD}, {SHARD: shard}, {SHARD: [0, 1]})
    exchange_loaded_tensors_gather_rounds({SHARD: torch.ones(2)}, {}, plan, layout.language_groups.dp_cp)


def receive_shard(data):
    """The other side: memory for a shard that arrives."""
    shard = ShardedTensor.from_rank_offsets("w", torch.ones(2))
    shard.data = data
    tensor, _ = _get_empty_tensor_for_exchange(SHARD, {SHARD: shard}, {}, {})
    assert tensor.device.type == "cpu"


CASES = {
    "torch.cuda.current_device": wrap,
    "torch.cuda.current_stream": reduce_gradients,
    "torch.cuda.manual_seed": lambda layout: tracker_is_seeded(),
    "torch.cuda.get_rng_state": lambda layout: tracker_is_seeded(),
    "torch.cuda.random.get_rng_state": recompute,
    "torch.Tensor.type": lambda layout: make_optimizer(layout, wrap(layout)),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": fork_is_isolated,
    "megatron.core.optimizer.optimizer.torch": lambda layout: make_optimizer(layout, wrap(layout)),
    "megatron.core.optimizer.clip_grads.torch": lambda layout: get_grad_norm_fp32([torch.ones(3)]),
    "megatron.core.pipeline_parallel.schedules.torch": run_schedule,
    "megatron.core.utils.torch": lambda layout: get_grad_norm_fp32([torch.ones(3)]),
    f"{OPTIMIZER}.state_dict": lambda layout: make_optimizer(layout, wrap(layout)).state_dict(),
    f"{OPTIMIZER}.load_state_dict": steps_are_separate,
    f"{OPTIMIZER}._set_main_param_and_optimizer_states": load_optimizer_state,
    "torch.Tensor.cuda": send_shard,
    "megatron.core.dist_checkpointing.exchange_utils.torch": lambda layout: receive_shard(torch.ones(2)),
    "megatron.core.dist_checkpointing.mapping.ShardedTensor.init_data": lambda layout: receive_shard(None),
}


def tracker_is_seeded():
    """The tracker's state is the one its seed gives."""
    expected = torch.Generator().manual_seed(1 + 2718).get_state()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    assert torch.equal(tensor_parallel.get_cuda_rng_tracker().get_states()["model-parallel-rng"], expected)


def test_every_replacement_has_a_case():
    assert set(CASES) | {"torch.cuda.synchronize"} == set(cpu.REPLACEMENTS)


@pytest.mark.parametrize("name", CASES)
def test_needed(name, layout):
    random_state = torch.get_rng_state()
    CASES[name](layout)
    with cpu.restored(name), pytest.raises((AssertionError, RuntimeError, TypeError, KeyError)):
        CASES[name](layout)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.set_rng_state(random_state)


@pytest.mark.parametrize("name", ["torch.cuda.synchronize"])
def test_needed_to_save(name, layout, tmp_path):
    save_checkpoint(layout, _made(tmp_path / "with"))
    with cpu.restored(name), pytest.raises((AssertionError, RuntimeError)):
        save_checkpoint(layout, _made(tmp_path / "without"))


def _made(folder):
    folder.mkdir()
    return folder


def test_installing_again_changes_nothing():
    before = torch.cuda.current_device
    cpu.install_if_no_cuda()
    assert torch.cuda.current_device is before


def test_only_listed_modules_see_another_torch():
    import megatron.core.tensor_parallel.layers as layers

    assert layers.torch is torch
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64
