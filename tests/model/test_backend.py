"""Choosing a backend, and the leaf modules of the plain one."""

import pytest
import torch

from nemovl_train.exceptions import UserError
from nemovl_train.model.backend import TORCH, select_backend

# isort: split
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


def config(**options):
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=4, num_query_groups=2, **options)


@without_cuda
def test_auto_is_plain_without_cuda():
    assert select_backend("auto") is TORCH


@without_cuda
def test_te_without_cuda_says_what_to_do():
    with pytest.raises(UserError, match=r"needs a CUDA device.*set precision\.backend=torch"):
        select_backend("te")


def test_unknown_backend():
    with pytest.raises(UserError, match="torch, te, auto"):
        select_backend("apex")


@pytest.mark.parametrize(("normalization", "names"), [("RMSNorm", {"weight"}), ("LayerNorm", {"weight", "bias"})])
def test_norm_marks_its_parameters(normalization, names):
    options = config(
        normalization=normalization, sequence_parallel=True, tensor_model_parallel_size=2, params_dtype=torch.bfloat16
    )
    norm = TORCH.norm(config=options, hidden_size=8, eps=1e-6)
    parameters = dict(norm.named_parameters())
    assert set(parameters) == names
    assert norm.eps == 1e-6
    assert all(p.sequence_parallel and p.dtype == torch.bfloat16 for p in parameters.values())


def test_attention_without_a_pack_sees_every_token():
    attention = TORCH.core_attention(
        config(attention_dropout=0.0), layer_number=1, attn_mask_type=AttnMaskType.no_mask, attention_type="self"
    )
    query, key, value = (torch.randn(5, 3, heads, 2, dtype=torch.float64) for heads in (4, 2, 2))
    out = attention(query, key, value, None, AttnMaskType.no_mask).view(5, 3, 4, 2)
    for head in range(4):
        q, k, v = query[:, :, head], key[:, :, head // 2], value[:, :, head // 2]
        weights = torch.einsum("ibd,jbd->bij", q, k).div(2**0.5).softmax(-1)
        torch.testing.assert_close(out[:, :, head], torch.einsum("bij,jbd->ibd", weights, v))
