"""megatron-core's own trainer on the language model: DDP, distributed optimizer, schedule, recompute, checkpoint."""

import pytest
import torch
from torch import nn

from nemovl_train.config.schema import LanguageConfig, ParallelConfig
from nemovl_train.model.backend import TORCH
from nemovl_train.model.init import init_weights
from nemovl_train.model.language import build_language_model
from nemovl_train.model.packing import PackParams
from nemovl_train.parallel.layout import Layout

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

CONFIG = LanguageConfig(
    hidden_size=32,
    hybrid_pattern="M-*",
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=64,
    mamba_num_heads=4,
    mamba_head_dim=8,
    mamba_state_dim=8,
    mamba_num_groups=2,
    chunk_size=16,
    vocab_size=64,
    base_vocab_size=64,
)
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.0}
CLIP = 0.5


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


def make_model(layout, **options):
    model = build_language_model(CONFIG, layout, params_dtype=torch.float32, backend=TORCH, **options)
    init_weights(model, seed=3, std=0.1)
    return model


class Trainer:
    """A model under megatron-core's DDP and distributed optimizer."""

    def __init__(self, layout, **options):
        self.layout, self.model = layout, make_model(layout, **options)
        self.config = self.model.config
        self.config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.wrapped = DistributedDataParallel(self.config, ddp, self.model, pg_collection=layout.language_groups)
        options = OptimizerConfig(
            optimizer="adam",
            lr=SETTINGS["lr"],
            adam_beta1=SETTINGS["betas"][0],
            adam_beta2=SETTINGS["betas"][1],
            adam_eps=SETTINGS["eps"],
            weight_decay=SETTINGS["weight_decay"],
            clip_grad=CLIP,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(
            options, [self.wrapped], use_gloo_process_groups=False, pg_collection=layout.language_groups
        )

    def step(self, number):
        """Two packs; the loss divisor is already in the weights."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = forward_backward_no_pipelining(
            forward_step_func=lambda data, model: (
                model(*next(data)),
                lambda loss: (loss.sum() / 40, torch.tensor(1, dtype=torch.int), {"loss": loss.detach().sum()}),
            ),
            data_iterator=iter([batch(number, i) for i in range(2)]),
            model=self.wrapped,
            num_microbatches=1,
            seq_length=40,
            micro_batch_size=1,
            pg_collection=self.layout.language_groups,
        )
        _, norm, _ = self.optimizer.step()
        return reports[0]["loss"], norm

    def metadata(self):
        return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": self.layout.language_groups.dp_cp}

    def state(self, is_loading):
        model = self.model.sharded_state_dict(metadata=self.metadata())
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=self.metadata())
        return {"model": model, "optimizer": optimizer}


def batch(step, micro):
    generator = torch.Generator().manual_seed(10 * step + micro)
    ids = torch.randint(0, CONFIG.vocab_size, (40,), generator=generator)
    seq_idx = (torch.arange(40) >= 17).int()[None]
    labels = torch.where(torch.arange(40) % 3 == 0, -100, ids.roll(-1))
    return ids, PackParams.from_boundaries(torch.tensor([0, 17, 40, 40]).int(), seq_idx, 32), labels


def test_training_equals_plain_pytorch(layout):
    trainer, plain = Trainer(layout, **RECOMPUTE), make_model(layout)
    named = dict(plain.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), **SETTINGS)
    for step in range(3):
        loss, norm = trainer.step(step)
        optimizer.zero_grad()
        expected = plain(*batch(step, 0)).sum()
        (expected / 40).backward()
        expected_norm = nn.utils.clip_grad_norm_(named.values(), CLIP)
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        assert norm == pytest.approx(float(expected_norm), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-5, msg=name)


def test_recompute_changes_no_gradient(layout):
    gradients = []
    for options in ({}, RECOMPUTE):
        model = make_model(layout, **options)
        model(*batch(0, 0)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_saved_and_loaded_training_continues_bitwise(layout, tmp_path):
    first = Trainer(layout)
    for step in range(2):
        first.step(step)
    dist_checkpointing.save(first.state(is_loading=False), str(tmp_path))
    second = Trainer(layout)
    for parameter in second.model.parameters():
        parameter.data.zero_()
    loaded = dist_checkpointing.load(second.state(is_loading=True), str(tmp_path))
    second.model.load_state_dict(loaded["model"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    assert first.step(2) == second.step(2)
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
