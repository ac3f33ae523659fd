"""Attention over packs on any number of context parallel ranks, and the `torch` backend's plain dot products.

Shape legend: S tokens in a pack, L of this rank (or of a tile or document), R ranks, B tiles, Q query and K key/value
heads, D head width.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemovl_train.model import cache
from nemovl_train.model.packing import PackParams
from nemovl_train.parallel import cpu
from nemovl_train.parallel.exchange import gather_columns, gather_tokens, scatter_columns

cpu.install_if_no_cuda()

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class ContextAttention(MegatronModule):
    """Core attention of the language model: a backend's plain packed attention over tokens that ranks share.

    Ranks hold runs of tokens in the pack's own order. Where the key/value heads divide by R, one all-to-all gives every
    rank all tokens of its share of the heads and another gives the tokens back: the plain kernel then sees whole packs,
    and equal shares of heads are equal work. Where they don't, keys and values of all tokens are gathered, and every
    rank asks for its own tokens; later ranks see more keys, so the work is uneven.

    Rotary angles are applied here, before any exchange, by the tokens' places in their documents: megatron-core's own
    packed form expects its zig-zag order of tokens.

    Args:
        core: The backend's attention, a megatron-core module.
        config: Sizes before tensor and context parallelism.
        pg_collection: Groups, of which `tp` and `cp` are used.
        options: What else megatron-core's attention layer passes on.
    """

    def __init__(self, core: Any, config: TransformerConfig, pg_collection: ProcessGroupCollection, **options: Any):
        super().__init__(config)
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.layer_number: int = options["layer_number"]
        ranks = self.cp_group.size()
        assert config.num_query_groups is not None
        self.exchanges_heads = config.num_query_groups // self.tp_group.size() % ranks == 0
        own = copy.copy(config)
        own.context_parallel_size = 1
        if self.exchanges_heads:
            own.num_attention_heads //= ranks
            own.num_query_groups //= ranks
        self.core = core(config=own, pg_collection=pg_collection, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType,
        attention_bias: None = None,
        packed_seq_params: PackParams | None = None,
    ) -> Tensor:
        """Attends causally inside the documents of a pack.

        Args:
            query: [L, Q, D].
            key: [L, K, D].
            value: Like `key`.
            attention_mask: Must be None.
            attn_mask_type: `causal`.
            attention_bias: Must be None.
            packed_seq_params: Document boundaries of the whole pack.

        Returns:
            [L, Q * D].
        """
        assert packed_seq_params is not None, "packs are the only batch"
        pack, width = packed_seq_params, query.shape[-1]
        if pack.rotary is not None:
            query, key = (self._rotated(t, pack.rotary) for t in (query, key))
        if isinstance(pack, cache.CachedParams):
            return cache.attend(query, key, value, self.layer_number, pack)
        if self.cp_group.size() == 1:
            return self._plain(query, key, value, attn_mask_type, pack)
        if self.exchanges_heads:
            parts = scatter_columns([t.flatten(1) for t in (query, key, value)], self.cp_group)
            query, key, value = (t.unflatten(1, (-1, width)) for t in parts)
            return gather_columns(self._plain(query, key, value, attn_mask_type, pack).flatten(1), self.cp_group)
        gathered = gather_tokens(torch.cat([key, value], dim=1), self.cp_group)
        key, value = gathered[pack.first_key : pack.context.stop].chunk(2, dim=1)
        return self._plain(query, key, value, AttnMaskType.causal_bottom_right, pack.own_queries)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: AttnMaskType, pack: PackParams) -> Tensor:
        return dense_attention(self.core, query, key, value, mask, pack)

    def _rotated(self, heads: Tensor, angles: Tensor) -> Tensor:
        return apply_rotary_pos_emb(heads.unsqueeze(1), angles, self.config, cp_group=self.cp_group).squeeze(1)


def dense_attention(
    core: Any, query: Tensor, key: Tensor, value: Tensor, mask: AttnMaskType, pack: PackParams
) -> Tensor:
    """A backend's attention, on inputs that are dense in memory.

    Transformer Engine 2.20 recognises keys and values that lie beside each other and then takes the queries to be dense
    without a look (`get_qkv_layout` in `attention/dot_product_attention/utils.py`). Where a rank has one key/value head
    they are a view of the fused projection and are not: it computes with the wrong numbers.

    Args:
        core: The backend's attention.
        query: [L, Q, D].
        key: [M, K, D], of the tokens that these queries can see.
        value: Like `key`.
        mask: `causal`, or `causal_bottom_right` where queries are the last of their documents' keys.
        pack: Boundaries of both.

    Returns:
        [L, Q * D].
    """
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    return core(query, key, value, None, attn_mask_type=mask, packed_seq_params=pack)


class TorchAttention(MegatronModule):
    """Core attention with megatron-core's interface, without parameters or dropout.

    With pack parameters it is causal inside every document of a pack; without them it is what `attn_mask_type` says
    over a batch of equal sequences (the vision tower's case: every token of a tile sees every other).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        assert attention_type == "self"
        assert not config.attention_dropout
        assert not attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackParams | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            query: [S, Q, D] for a pack, [L, B, Q, D] for a batch.
            key: [S, K, D] or [L, B, K, D]; K divides Q. A pack may have fewer queries than keys.
            value: Like `key`.
            attention_mask: Unused: boundaries come from the pack parameters.
            attn_mask_type: `causal` for packs, or `causal_bottom_right` where documents have fewer queries than keys;
                `causal` or `no_mask` for a batch.
            attention_bias: Must be None.
            packed_seq_params: Document boundaries of the pack.

        Returns:
            [S, Q * D] or [L, B, Q * D].
        """
        assert attention_bias is None
        if packed_seq_params is None:
            causal = attn_mask_type == AttnMaskType.causal
            query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            return self._attend(query, key, value, causal).permute(2, 0, 1, 3).flatten(2)
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.causal_bottom_right)
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        # One call per document: no work and no memory for pairs of tokens that must not see each other.
        out = [
            self._attend(query[:, :, asked], key[:, :, seen], value[:, :, seen], True)
            for asked, seen in packed_seq_params.documents
        ]
        return torch.cat(out, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """[B, heads, L, D] each -> [B, Q, L, D]. The last query and the last key are one token."""
        options: dict[str, Any] = {"scale": self.scale, "enable_gqa": query.shape[1] != key.shape[1]}
        queries, keys = query.shape[2], key.shape[2]
        if not causal or queries == keys:
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, **options)
        visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_(keys - queries)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, **options)
