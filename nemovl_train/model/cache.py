"""What decoding remembers between tokens: keys and values of attention, convolution inputs and states of Mamba layers.

A batch of M documents is decoded in two kinds of passes, both over a pack without padding between documents:

    fill   the whole prompts, one after the other; every layer notes what later tokens of each document need
    step   one new token of every document, in the same order

`CachedParams` takes the place of a pack's `PackParams` and so reaches every layer; a layer that meets it calls
`attend` or `mamba_inner` below instead of its training form. Both run on any device and dtype with either backend: the
cores here are PyTorch's own attention and this package's scan. Ranks that share a layer's heads each keep theirs; ranks
that would share a pack's tokens all do the same work, since one token cannot be shared.

Shape legend: M documents, S tokens of a pass, L tokens seen of the longest document, Q query and K key/value heads,
D head width, H Mamba heads, P their width, G groups, N state width, C convolved columns, W taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from nemovl_train.model.kernels import dispatch
from nemovl_train.model.mamba_parts import MambaParameters, MambaSizes
from nemovl_train.model.packing import PackParams

GROWTH = 256
"""Tokens by which the room for keys and values grows at least."""


@dataclass
class KeysAndValues:
    """Of one attention layer: [M, K, room, D] each; what lies behind a document's length has no meaning."""

    keys: Tensor
    values: Tensor


@dataclass
class MambaState:
    """Of one Mamba layer: the last W - 1 inputs of the convolution [M, W - 1, C], and the state [M, H, P, N]."""

    taps: Tensor
    state: Tensor


class DecodingCache:
    """Memory of M documents, by layer.

    Attributes:
        lengths: Tokens seen of every document.
        attention: By layer number.
        mamba: By layer number.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.attention: dict[int, KeysAndValues] = {}
        self.mamba: dict[int, MambaState] = {}

    def keep(self, documents: Sequence[int]) -> None:
        """Forget all documents but these; they come in this order from now on.

        Args:
            documents: Numbers among the present ones.
        """
        self.lengths = [self.lengths[i] for i in documents]
        for layer in self.attention.values():
            index = torch.tensor(documents, device=layer.keys.device)
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        for state in self.mamba.values():
            index = torch.tensor(documents, device=state.state.device)
            state.taps, state.state = state.taps[index], state.state[index]


@dataclass
class CachedParams(PackParams):
    """One pass over a cache, as the layers take it. Use `of`.

    Attributes:
        cache: What is read and extended.
        new: New tokens of every document.
    """

    cache: DecodingCache = field(default_factory=DecodingCache)
    new: tuple[int, ...] = ()

    @classmethod
    def of(cls, cache: DecodingCache, new: Sequence[int], size: int, device: torch.device) -> CachedParams:
        """Describes a pass. The cache counts its tokens at once; its layers see them when they run.

        Args:
            cache: An empty one for a fill; else `new` must be one token of every document.
            new: New tokens of every document, in order.
            size: Tokens of the pass: those of the documents, then padding whose outputs have no meaning.
            device: Where the model is.
        """
        filling = not cache.lengths
        assert filling or (len(new) == len(cache.lengths) and set(new) == {1}), "a step is one token of every document"
        before = [0] * len(new) if filling else cache.lengths
        ends = [0, *accumulate(new)]
        documents = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(list(new)))
        seq_idx = F.pad(documents, (0, size - ends[-1]), value=len(new)).to(torch.int32)[None]
        cu_seqlens = torch.tensor([*ends, size] if size > ends[-1] else ends, dtype=torch.int32)
        cache.lengths = [seen + more for seen, more in zip(before, new, strict=True)]
        longest = max(*cache.lengths, size - ends[-1])
        params = cls.from_boundaries(cu_seqlens.to(device), seq_idx.to(device), longest)
        params.cache, params.new = cache, tuple(new)
        return params

    @property
    def filling(self) -> bool:
        """This pass sees the documents from their first token on."""
        return self.cache.lengths == list(self.new)

    @cached_property
    def spans(self) -> list[slice]:
        """Tokens of every document in this pass."""
        return [slice(start, end) for start, end in pairwise(accumulate(self.new, initial=0))]

    @cached_property
    def position_ids(self) -> Tensor:
        """[S] int64, place of every token in its document."""
        lengths = zip(self.cache.lengths, self.new, strict=True)
        places = [torch.arange(seen - more, seen) for seen, more in lengths]
        tail = self.seq_idx.shape[1] - sum(self.new)
        return torch.cat([*places, torch.arange(tail)]).to(self.seq_idx.device)

    @cached_property
    def reached(self) -> Tensor:
        """[M, 1, 1, L] bool: places that a document has, its new token among them."""
        lengths = torch.tensor(self.cache.lengths, device=self.seq_idx.device)
        return (torch.arange(max(self.cache.lengths), device=lengths.device) < lengths[:, None])[:, None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, params: CachedParams) -> Tensor:
    """Causal attention of the new tokens to all tokens of their documents.

    Args:
        query: [S, Q, D].
        key: [S, K, D].
        value: Like `key`.
        layer: Number of the layer.
        params: The pass.

    Returns:
        [S, Q * D], zero at padding.
    """
    out = query.new_zeros(len(query), query.shape[1] * query.shape[2])
    grouped = query.shape[1] != key.shape[1]
    if params.filling:
        room = -(-max(params.new) // GROWTH) * GROWTH
        shape = (len(params.new), key.shape[1], room, key.shape[2])
        stored = KeysAndValues(key.new_zeros(shape), value.new_zeros(shape))
        params.cache.attention[layer] = stored
        for number, span in enumerate(params.spans):
            q, k, v = (t[span].transpose(0, 1)[None] for t in (query, key, value))
            stored.keys[number, :, : k.shape[2]], stored.values[number, :, : v.shape[2]] = k[0], v[0]
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            out[span] = seen[0].transpose(0, 1).flatten(1)
        return out
    stored, documents = params.cache.attention[layer], len(params.new)
    longest = max(params.cache.lengths)
    if longest > stored.keys.shape[2]:
        stored.keys, stored.values = (F.pad(t, (0, 0, 0, GROWTH)) for t in (stored.keys, stored.values))
    rows = torch.arange(documents, device=key.device)
    places = params.position_ids[:documents]
    stored.keys[rows, :, places], stored.values[rows, :, places] = key[:documents], value[:documents]
    keys, values = stored.keys[:, :, :longest], stored.values[:, :, :longest]
    seen = F.scaled_dot_product_attention(
        query[:documents].unsqueeze(2), keys, values, attn_mask=params.reached, enable_gqa=grouped
    )
    out[:documents] = seen.flatten(1)
    return out


def mamba_inner(
    projected: Tensor, parameters: MambaParameters, sizes: MambaSizes, *, eps: float, layer: int, params: CachedParams
) -> Tensor:
    """All of a Mamba-2 layer between its two projections.

    Args:
        projected: [S, 2 * H * P + 2 * G * N + H], columns z, x, B, C, dt.
        parameters: Those of the columns that are here.
        sizes: Their sizes.
        eps: Epsilon of the gated norm.
        layer: Number of the layer.
        params: The pass.

    Returns:
        [S, H * P], zero at padding.
    """
    out = projected.new_zeros(len(projected), sizes.inner)
    if not params.filling:
        documents = len(params.new)
        y = _step(projected[:documents], parameters, sizes, params.cache.mamba[layer])
        out[:documents] = _gated(y, projected[:documents], parameters, sizes, eps)
        return out
    _, mixed, _ = sizes.split(projected)
    taps = mixed.new_zeros(len(params.new), sizes.taps - 1, mixed.shape[1])
    convolved = dispatch.causal_conv(mixed, parameters.conv_weight, parameters.conv_bias, params.seq_idx)
    states = []
    for number, span in enumerate(params.spans):
        last = mixed[span][1 - sizes.taps :]
        taps[number, taps.shape[1] - len(last) :] = last
        state = None
        # The scan's kernels count elements in 32 bits: a long document goes through them in pieces.
        for start in range(span.start, span.stop, sizes.longest_piece):
            piece = slice(start, min(start + sizes.longest_piece, span.stop))
            y, state = _scan(projected[piece], convolved[piece], parameters, sizes, state)
            out[piece] = _gated(y, projected[piece], parameters, sizes, eps)
        states.append(state)
    params.cache.mamba[layer] = MambaState(taps, torch.stack([s for s in states if s is not None]))
    return out


def _scan(
    projected: Tensor, convolved: Tensor, parameters: MambaParameters, sizes: MambaSizes, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs [n, H, P] of some tokens of one document and the state after them [H, P, N]."""
    x, b, c = sizes.states(convolved)
    return dispatch.chunk_scan(
        x,
        sizes.split(projected)[2],
        -torch.exp(parameters.a_log.float()),
        b,
        c,
        d=parameters.d.float(),
        dt_bias=parameters.dt_bias.float(),
        seq_idx=torch.zeros(1, len(x), dtype=torch.int32, device=x.device),
        chunk_size=sizes.chunk,
        initial_state=state,
    )


def _step(projected: Tensor, parameters: MambaParameters, sizes: MambaSizes, memory: MambaState) -> Tensor:
    """One token of every document: [M, all columns] -> [M, H, P]. The recurrence itself, in float32."""
    _, mixed, dt = sizes.split(projected)
    compute = torch.promote_types(mixed.dtype, torch.float32)
    window = torch.cat([memory.taps, mixed.unsqueeze(1)], dim=1)
    memory.taps = window[:, 1:]
    convolved = torch.einsum("mwc,cw->mc", window.to(compute), parameters.conv_weight.to(compute))
    # Rounded as in the fill, whose convolution gives the storage type.
    convolved = F.silu(convolved + parameters.conv_bias.to(compute)).to(mixed.dtype)
    x, b, c = (part.to(compute) for part in sizes.states(convolved))
    heads_of_group = sizes.heads // sizes.groups
    b, c = (part.repeat_interleave(heads_of_group, dim=1) for part in (b, c))
    step = F.softplus(dt.to(compute) + parameters.dt_bias.to(compute))
    decay = torch.exp(-step * torch.exp(parameters.a_log.to(compute)))
    added = torch.einsum("mhp,mhn->mhpn", x * step.unsqueeze(-1), b)
    memory.state = memory.state * decay[..., None, None] + added
    y = torch.einsum("mhpn,mhn->mhp", memory.state, c) + x * parameters.d.to(compute)[:, None]
    return y.to(mixed.dtype)


def _gated(y: Tensor, projected: Tensor, parameters: MambaParameters, sizes: MambaSizes, eps: float) -> Tensor:
    gate = sizes.split(projected)[0]
    return dispatch.gated_rms_norm(y.flatten(1), gate, parameters.norm_weight, group_size=sizes.group_size, eps=eps)
