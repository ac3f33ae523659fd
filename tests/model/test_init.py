"""Initial weights: the same whole tensor for every layout, right scales."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nemovl_train.model.init import init_weights, join_parts


class Part(nn.Module):
    """Parameters of each kind, as a rank of a tensor parallel group of `tp` holds them."""

    def __init__(self, tp):
        super().__init__()
        self.mixer = nn.Module()
        self.mixer.in_proj = self.split(8 // tp + 4 // tp + 2 // tp, 6, sizes=[8 // tp, 4 // tp, 2 // tp])
        self.mixer.out_proj = self.split(6, 400 // tp, dim=1)
        self.mixer.A_log, self.mixer.dt_bias, self.mixer.D = (self.split(16 // tp).weight for _ in range(3))
        self.mixer.conv1d_weight = self.split(12 // tp, 1, 4).weight
        self.linear_fc1 = self.split(8 // tp, 300)
        self.linear_fc1.weight.partition_stride = 2
        self.norm = nn.RMSNorm(6)

    @staticmethod
    def split(*shape, dim=0, sizes=None):
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(*shape))
        module.weight.tensor_model_parallel, module.weight.partition_dim = True, dim
        if sizes:
            module.weight.partition_sizes = sizes
        return module


def initialised(tp, rank, seed=1, **options):
    part = Part(tp)
    init_weights(part, seed=seed, std=0.02, prefix="part.", tp_size=tp, tp_rank=rank, **options)
    return dict(part.named_parameters())


def test_ranks_hold_parts_of_the_same_whole():
    whole, ranks = initialised(1, 0), [initialised(2, rank) for rank in range(2)]
    for name, tensor in whole.items():
        assert torch.equal(join_parts([rank[name].detach() for rank in ranks], ranks[0][name]), tensor), name
    plain = torch.cat([rank["mixer.in_proj.weight"] for rank in ranks])
    assert not torch.equal(plain, whole["mixer.in_proj.weight"]), "packed components are split one by one"


def test_seed_and_name_decide():
    first, other = initialised(1, 0), initialised(1, 0, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), initialised(1, 0).values(), strict=True))
    assert not torch.equal(first["linear_fc1.weight"], other["linear_fc1.weight"])
    assert not torch.equal(first["mixer.A_log"], first["mixer.dt_bias"])


def test_scales():
    named = initialised(1, 0, residual_additions=4)
    assert float(named["linear_fc1.weight"].detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(named["mixer.out_proj.weight"].detach().std()) == pytest.approx(0.02 / math.sqrt(4), rel=0.1)
    decay, step = named["mixer.A_log"].detach().exp(), F.softplus(named["mixer.dt_bias"].detach())
    assert ((decay >= 1) & (decay <= 16)).all()
    assert ((step >= 9e-4) & (step <= 0.11)).all()
    assert (named["mixer.D"] == 1).all()
    assert (named["norm.weight"] == 1).all()
    assert 0.3 < float(named["mixer.conv1d_weight"].detach().abs().max()) <= 0.5
