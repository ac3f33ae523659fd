"""Attention of one rank's queries over all keys on one GPU: every rank's part in turn against the whole pack."""

import pytest
import torch
from gpu_packs import relative

from nemovl_train.config.schema import LanguageConfig, ParallelConfig
from nemovl_train.model.attention import TorchAttention
from nemovl_train.model.backend import select_backend
from nemovl_train.model.language import language_transformer_config
from nemovl_train.model.packing import PackParams
from nemovl_train.parallel.layout import Layout

# isort: split
from megatron.core.transformer.enums import AttnMaskType

pytestmark = pytest.mark.gpu

LENGTHS = (300, 700, 24, 1, 999, 24)
RANKS = 4
BF16 = 1e-2


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


def pack_of(context: range | None = None) -> PackParams:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int()[None].cuda()
    return PackParams.from_boundaries(ends, ids, 1024, context)


def attention(core, layout, dtype):
    config = language_transformer_config(LanguageConfig(), layout, dtype)
    options = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return core(config=config, pg_collection=layout.language_groups, **options)


@pytest.mark.parametrize("name", ["te", "torch"])
def test_queries_of_each_rank_see_what_the_whole_pack_sees(name, layout, record):
    backend = select_backend(name)
    generator = torch.Generator().manual_seed(0)
    size = sum(LENGTHS)
    tensors = [torch.randn(size, heads, 128, generator=generator).bfloat16().cuda() for heads in (40, 8, 8)]
    weight = torch.randn(size, 40 * 128, generator=generator).bfloat16().cuda()

    def run(core, dtype, ranks):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        query, key, value = leaves
        outputs = []
        for rank in range(ranks):
            held = range(size * rank // ranks, size * (rank + 1) // ranks)
            own = query[held.start : held.stop]
            if ranks == 1:
                out = core(own, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=pack_of())
            else:
                seen = [t[: held.stop] for t in (key, value)]
                options = {"attn_mask_type": AttnMaskType.causal_bottom_right}
                out = core(own, *seen, None, **options, packed_seq_params=pack_of(held).own_queries)
            outputs.append(out.reshape(len(held), -1))
        out = torch.cat(outputs)
        out.backward(weight.to(dtype))
        return [out, *(leaf.grad for leaf in leaves)]

    exact = run(attention(TorchAttention, layout, torch.float32), torch.float32, 1)
    core = attention(backend.core_attention, layout, torch.bfloat16)
    for ranks in (1, RANKS):
        for what, mine, theirs in zip(
            ("output", "query", "key", "value"), run(core, torch.bfloat16, ranks), exact, strict=True
        ):
            error = relative(mine, theirs)
            record(f"attention {name} bf16, {ranks} parts, {what}", error, BF16)
            assert error <= BF16, (ranks, what)
