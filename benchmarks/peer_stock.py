"""Stock megatron-core as a peer: its `HybridModel` on its own Transformer Engine layers, given the packs of a case.

The layers are megatron-core's `hybrid_stack_spec`, its mixer, attention by ring over context parallel ranks, its
recomputation and its vocabulary-parallel cross entropy from Transformer Engine, at every position. Gradient buffers,
distributed optimizer and micro-batch schedule are megatron-core's in either program and are driven by the same code.
Initial weights are the same numbers, so that the first loss of a case tells whether both compute the same thing.

Departures from what its training script would do, all in its favour: weight gradients are added by Transformer Engine's
linears without apex; bucketed document boundaries (without context parallelism), so that its kernels are not planned
anew for every pack; attention is told that documents have no gaps.

With `small` there is no Transformer Engine: the same model class gets this project's plain layers, which tries this
file's batches and losses and is no peer.

Shape legend: n tokens of a micro-batch on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from data_pipelines.schema import Pack
from nemovl_train.config.schema import LanguageConfig
from nemovl_train.model.init import init_weights
from nemovl_train.model.language import hybrid_stack_spec, language_transformer_config
from nemovl_train.model.loss import IGNORE
from nemovl_train.model.packing import PackParams
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.optimizer import Optimizers

# isort: split
# The layout module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.activations import squared_relu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.module import MegatronModule

FORMS = ("packed", "alone", "padded")
"""What a micro-batch is: a pack; one document; one document in a row as long as a pack."""


@dataclass(frozen=True)
class StockBatch:
    """One micro-batch on the device.

    Attributes:
        input_ids: [n] int64.
        labels: [n] int64, already shifted; `IGNORE` where there is none.
        loss_weight: [n] float32, divisor included.
        params: Document boundaries; None for one document.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weight: Tensor
    params: PackedSeqParams | None


class StockModel(MegatronModule):
    """A text-only language model under the names by which the optimizers know the parts of ours."""

    def __init__(self, language: HybridModel) -> None:
        super().__init__(language.config)
        self.language_model = language
        self.vision_model = self.projector = None
        self.model_type = language.model_type

    def forward(self, batch: StockBatch) -> Tensor:
        """Cross entropy [n] of every position."""
        return self.language_model(
            batch.input_ids[None], None, None, labels=batch.labels[None], packed_seq_params=batch.params
        ).squeeze(0)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Part of the protocol of megatron-core's schedules; there is no pipeline stage before this model."""
        assert input_tensor is None or input_tensor == [None]


class StockOptimizers(Optimizers):
    """megatron-core's gradient buffers and optimizer as ours drive them, over the peer's own micro-batches."""

    def __init__(self, model: StockModel, layout: Layout, case: Any, dtype: torch.dtype, *, small: bool) -> None:
        super().__init__(model, layout, case.optim, dtype)  # type: ignore[arg-type]
        self._form, self._small = case.form, small

    def forward_backward(self, packs: Sequence[Pack], scales: Sequence[float], **_: Any) -> Tensor:
        """As `Optimizers.forward_backward`: the sum of this rank's scaled losses."""
        batches = [
            (pack, scale, *row)
            for pack, scale in zip(packs, scales, strict=True)
            for row in micro_batches(pack, self._form)
        ]

        def put() -> Iterator[StockBatch]:
            for row in batches:
                yield self._batch(*row)

        def forward_step(iterator: Iterator[StockBatch], model: StockModel) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(iterator)

            def weighted_sum(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                loss = (losses.float() * batch.loss_weight).sum()
                return loss, torch.ones((), dtype=torch.int, device=loss.device), {"loss": loss.detach()}

            return model(batch), weighted_sum

        outputs = forward_backward_no_pipelining(
            forward_step_func=forward_step,
            data_iterator=put(),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=len(packs[0].input_ids) // self.layout.cp,
            micro_batch_size=1,
            forward_only=False,
            pg_collection=self.layout.language_groups,
        )
        return torch.stack([output["loss"] for output in outputs]).sum()

    def _batch(self, pack: Pack, scale: float, tokens: slice, length: int) -> StockBatch:
        """Some tokens of a pack in a row of some length, in this rank's share."""
        padded = length - (tokens.stop - tokens.start)
        alone = self._form != "packed"
        ends = [0, length] if alone else _without_repeats(pack.cu_seqlens)
        order = self._share(ends)

        def row(values: Tensor, blank: float) -> Tensor:
            whole = torch.cat([values[tokens], values.new_full((padded,), blank)])
            return whole[order].to(self.layout.device, non_blocking=True)

        return StockBatch(
            row(pack.input_ids, 0),
            row(pack.labels, IGNORE),
            row(pack.loss_weight, 0.0) * scale,
            self._params(pack, ends, alone=alone),
        )

    def _share(self, ends: list[int]) -> Tensor:
        """Positions that this context parallel rank holds: of every document one piece from each end."""
        cp, rank = self.layout.cp, self.layout.cp_rank
        if cp == 1 or self._small:
            held = self.layout.context_tokens(ends[-1])
            return torch.arange(held.start, held.stop)
        pieces = []
        for begin, end in pairwise(ends):
            assert (end - begin) % (2 * cp) == 0, "set document_multiple: the ring cuts every document in 2 x cp"
            parts = torch.arange(begin, end).chunk(2 * cp)
            pieces += [parts[rank], parts[2 * cp - 1 - rank]]
        return torch.cat(pieces)

    def _params(self, pack: Pack, ends: list[int], *, alone: bool) -> PackedSeqParams | None:
        device = self.layout.device
        bounds = torch.tensor(ends, dtype=torch.int32) if self.layout.cp > 1 or alone else pack.cu_seqlens
        if self._small:
            seq_idx = torch.repeat_interleave(torch.arange(len(ends) - 1), torch.tensor(ends).diff()).int()
            held = self.layout.context_tokens(ends[-1])
            first = ends[int(seq_idx[held.start])]
            return PackParams.from_boundaries(bounds, seq_idx[None], max(pack.max_seqlen, ends[1]), held, first)
        if alone:
            return None
        bounds = bounds.to(device, non_blocking=True)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=pack.max_seqlen,
            max_seqlen_kv=pack.max_seqlen,
            total_tokens=len(pack.input_ids),
            pad_between_seqs=False,
        )


def micro_batches(pack: Pack, form: str) -> list[tuple[slice, int]]:
    """Tokens of each micro-batch that a peer makes of a pack, and the length of its row."""
    assert form in FORMS, f"form is one of {FORMS}, not {form!r}"
    whole = len(pack.input_ids)
    if form == "packed":
        return [(slice(0, whole), whole)]
    spans = [slice(begin, end) for begin, end in pairwise(_without_repeats(pack.cu_seqlens))]
    return [(tokens, whole if form == "padded" else tokens.stop - tokens.start) for tokens in spans]


def stock_engine(case: Any, config: LanguageConfig, layout: Layout, dtype: torch.dtype, *, small: bool) -> Any:
    """The peer of a case with its optimizer.

    Raises:
        SystemExit: The case asks for what stock megatron-core does not have.
    """
    transformer = language_transformer_config(config, layout, dtype, **_options(case, config, small=small))
    if small:
        from nemovl_train.model.backend import TORCH

        spec = hybrid_stack_spec(TORCH, config, layout)
    else:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec

        transformer.activation_func = squared_relu
    language = HybridModel(
        config=transformer,
        hybrid_stack_spec=spec,
        vocab_size=config.vocab_size,
        max_sequence_length=case.seq_length,
        hybrid_layer_pattern=config.hybrid_pattern,
        position_embedding_type=config.position,
        pg_collection=layout.language_groups,
    )
    _draw(language, config, layout)
    return StockOptimizers(StockModel(language), layout, case, dtype, small=small)


def _options(case: Any, config: LanguageConfig, *, small: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"bias_dropout_fusion": not small}
    if not small:
        options |= {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}
    if case.precision.fp8 == "blockwise":
        ends = case.precision.bf16_layers
        options |= {"fp8": "e4m3", "fp8_recipe": "blockwise", "first_last_layers_bf16": ends > 0}
        options |= {"num_layers_at_start_in_bf16": ends, "num_layers_at_end_in_bf16": ends}
    recompute = case.recompute
    if recompute.language == "selective":
        raise SystemExit(f"{case.case}: stock megatron-core recomputes Mamba layers whole; set language_layers")
    if recompute.language == "full":
        layers = recompute.language_layers or config.num_layers
        options |= {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    return options


def _draw(language: HybridModel, config: LanguageConfig, layout: Layout) -> None:
    """The values that our model draws: they depend on a parameter's name, and most names are megatron-core's."""
    groups = layout.language_groups
    init_weights(
        language,
        seed=1234,
        std=config.init_std,
        prefix="language_model.",
        residual_additions=config.num_layers,
        tp_size=groups.tp.size(),
        tp_rank=groups.tp.rank(),
        device=layout.device,
    )
    for name, parameter in language.named_parameters():
        if name.endswith("layer_norm_weight"):  # norms that Transformer Engine fuses into the linear after them
            torch.nn.init.ones_(parameter)


def _without_repeats(cu_seqlens: Tensor) -> list[int]:
    """Ends of documents without the empty ones that fill the bucket."""
    return list(dict.fromkeys(cu_seqlens.tolist()))
