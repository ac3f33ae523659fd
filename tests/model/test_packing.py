"""What a rank knows of a pack: its documents, cut into pieces, and its own queries."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from nemovl_train.model.attention import dense_attention
from nemovl_train.model.packing import PackParams

LENGTHS = (5, 11, 1, 7, 8)  # 32 tokens; documents start at 0, 5, 16, 17 and 24
IDS = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS)).int()


def pack(context=None):
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    first_key = 0 if context is None else int(ends[IDS[context.start]])
    return PackParams.from_boundaries(torch.cat([ends, ends[-1:]]), IDS[None], 16, context, first_key)


@pytest.mark.parametrize("context", [range(0, 32), range(0, 16), range(16, 32), range(8, 24)])
@pytest.mark.parametrize("longest", [4, 8, 32])
def test_pieces_number_documents_from_the_token_before(context, longest):
    pieces = pack(context).pieces(whole=False, longest=longest, halo=3)
    positions = torch.arange(context.start, context.stop)
    assert torch.equal(torch.cat([positions[p.tokens] for p in pieces]), positions)
    for piece in pieces:
        tokens = positions[piece.tokens]
        assert len(tokens) <= longest
        first = int(tokens[0])
        if first == 0:
            assert torch.equal(piece.ids[0], IDS[tokens])
            assert piece.halo_ids.numel() == 0
        else:
            # 0 goes on with the document of the token before: that, and nothing later, may see a state from before.
            assert torch.equal(piece.ids[0] == 0, IDS[tokens] == IDS[first - 1])
            assert torch.equal(piece.halo_ids == 0, IDS[first - 3 : first] == IDS[first - 1])
        assert piece.ids.dtype == torch.int32


def test_pieces_of_the_whole_pack_do_not_ask_for_the_context():
    pieces = pack(range(16, 32)).pieces(whole=True, longest=32, halo=3)
    assert [p.tokens for p in pieces] == [slice(0, 32)]
    assert torch.equal(pieces[0].ids[0], IDS)


def test_pieces_are_made_once():
    params = pack()
    assert params.pieces(whole=True, longest=8, halo=3) is params.pieces(whole=True, longest=8, halo=3)


@pytest.mark.parametrize("context", [range(0, 16), range(16, 32), range(6, 10), range(24, 32)])
def test_own_queries_end_where_their_keys_end(context):
    params = pack(context)
    found = {
        key
        for queries, keys in params.own_queries.documents
        for key in [(range(queries.start, queries.stop), range(keys.start, keys.stop))]
    }
    expected = set()
    for number in IDS[context.start : context.stop].unique().tolist():
        document = (number == IDS).nonzero()[:, 0].tolist()
        mine = [i for i in document if i in context]
        seen = [i for i in document if i <= mine[-1]]
        start, first = context.start, params.first_key
        expected.add((range(mine[0] - start, mine[-1] + 1 - start), range(seen[0] - first, seen[-1] + 1 - first)))
    assert found == expected
    asked, seen = (cu.diff() for cu in (params.own_queries.cu_seqlens_q, params.own_queries.cu_seqlens_kv))
    assert torch.equal(asked > 0, seen > 0), "keys that nothing asks for have no gradient, and cuDNN writes none"
    assert torch.equal(params.position_ids, torch.cat([torch.arange(n) for n in LENGTHS])[context.start : context.stop])


def test_a_backend_gets_dense_tensors():
    """Transformer Engine reads a strided view of the fused projection as if it were dense."""
    fused, seen = torch.randn(16, 6, 4), []
    parts = fused[:, :4], fused[:, 4:5], fused[:, 5:]
    dense_attention(lambda *inputs, **_: seen.extend(inputs[:3]), *parts, AttnMaskType.causal, pack(range(16, 32)))
    assert not any(tensor.is_contiguous() for tensor in parts)
    assert all(tensor.is_contiguous() for tensor in seen)
    assert all(map(torch.equal, seen, parts))
