"""Attention of the `torch` backend: plain scaled dot products on any device.

Shape legend: S tokens in a pack, B tiles, L tokens of a tile or document, Q query and K key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemovl_train.model.packing import PackParams
from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


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
            key: [S, K, D] or [L, B, K, D]; K divides Q.
            value: Like `key`.
            attention_mask: Unused: boundaries come from the pack parameters.
            attn_mask_type: `causal` for packs; `causal` or `no_mask` for a batch.
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
        assert attn_mask_type == AttnMaskType.causal
        heads_first = [t.transpose(0, 1).unsqueeze(0) for t in (query, key, value)]
        # One call per document: no work and no memory for pairs of tokens that must not see each other.
        documents = zip(*(t.split(packed_seq_params.lengths, dim=2) for t in heads_first), strict=True)
        out = torch.cat([self._attend(q, k, v, True) for q, k, v in documents], dim=2)
        return out.squeeze(0).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """[B, heads, L, D] each -> [B, Q, L, D]."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=self.scale, enable_gqa=grouped)
