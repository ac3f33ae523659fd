"""Attention of one rank's queries over all keys on one GPU: every rank's part in turn against the whole pack."""

import pytest
import torch
from gpu_packs import relative

from nemovl_train.config.schema import LanguageConfig, ParallelConfig
from nemovl_train.model.attention import TorchAttention, dense_attention
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
SIZES = {"12b": (40, 8, 128), "few_heads": (8, 2, 16), "one_head": (8, 1, 16)}
"""Query heads, key/value heads, head width: the 12B's, and those of the layout matrix whose keys are gathered."""


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


def pack_of(context: range | None = None) -> PackParams:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int()[None].cuda()
    first_key = 0 if context is None else int(ends[ids[0, context.start]])
    return PackParams.from_boundaries(ends, ids, 1024, context, first_key)


def attention(core, layout, dtype, sizes=SIZES["12b"]):
    heads, groups, width = sizes
    language = LanguageConfig(num_attention_heads=heads, num_query_groups=groups, head_dim=width)
    config = language_transformer_config(language, layout, dtype)
    options = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return core(config=config, pg_collection=layout.language_groups, **options)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["te", "torch"])
def test_queries_of_each_rank_see_what_the_whole_pack_sees(name, sizes, layout, record):
    """Keys and values come as the exchange gives them: two views of one gathered tensor.

    Freed memory holds numbers, so that a gradient that a kernel does not write shows.
    """
    del [torch.full((2**28,), 3.0, device="cuda") for _ in range(2)][:]
    backend = select_backend(name)
    generator = torch.Generator().manual_seed(0)
    size = sum(LENGTHS)
    heads, groups, width = SIZES[sizes]
    tensors = [torch.randn(size, n, width, generator=generator).bfloat16().cuda() for n in (heads, groups, groups)]
    weight = torch.randn(size, heads * width, generator=generator).bfloat16().cuda()

    def run(core, dtype, ranks):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        query, key, value = leaves
        outputs = []
        for rank in range(ranks):
            held = range(size * rank // ranks, size * (rank + 1) // ranks)
            # As the layer has them: a view of the fused projection's rows.
            own = torch.cat([query, key, value], dim=1)[held.start : held.stop, :heads]
            if ranks == 1:
                out = dense_attention(core, own, key, value, AttnMaskType.causal, pack_of())
            else:
                pack = pack_of(held)
                seen = torch.cat([key, value], dim=1)[pack.first_key : held.stop].chunk(2, dim=1)
                out = dense_attention(core, own, *seen, AttnMaskType.causal_bottom_right, pack.own_queries)
            outputs.append(out.reshape(len(held), -1))
        out = torch.cat(outputs)
        out.backward(weight.to(dtype))
        return [out, *(leaf.grad for leaf in leaves)]

    exact = run(attention(TorchAttention, layout, torch.float32, SIZES[sizes]), torch.float32, 1)
    core = attention(backend.core_attention, layout, torch.bfloat16, SIZES[sizes])
    for ranks in (1, RANKS):
        for what, mine, theirs in zip(
            ("output", "query", "key", "value"), run(core, torch.bfloat16, ranks), exact, strict=True
        ):
            error = relative(mine, theirs)
            record(f"attention {name} bf16, {sizes}, {ranks} parts, {what}", error, BF16)
            assert error <= BF16, (ranks, what)
