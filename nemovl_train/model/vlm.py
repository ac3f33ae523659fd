"""The vision-language model: tower, projector and hybrid language model, joined by one placeholder per visual feature.

`input_ids` already hold one image token for each visual feature, so that lengths, masks and document boundaries are
known before the model runs: features replace rows of the embedding, nothing is expanded.

    tiles [T, 3, P, P] --tower--> [T, K, 4 D] --projector--> [T, K, H] --exchanged between the ranks of the pack-->
    input_ids [L] --embedding--> [L, 1, H] --rows at image tokens replaced--> hybrid stack --> cross entropy [L]

Shape suffixes: S tokens in a pack, L of them on this context parallel rank, T tiles, P tile side in pixels, K visual
tokens of a tile, D tower width, H language model width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemovl_train.config.precision import inner_layers
from nemovl_train.config.schema import PARTS, ModelConfig, PrecisionConfig, RecomputeConfig
from nemovl_train.exceptions import ConfigError, DataError
from nemovl_train.model.backend import Backend, select_backend
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.cache import CachedParams
from nemovl_train.model.fp8 import forget_quantized_weights, multiply_in_fp8
from nemovl_train.model.init import init_weights
from nemovl_train.model.language import LanguageModel, build_language_model, collect_weights
from nemovl_train.model.lora import adapters
from nemovl_train.model.offload import Host
from nemovl_train.model.projector import Projector
from nemovl_train.model.pruning import prune_videos
from nemovl_train.model.recompute import recompute_fully, recompute_selectively
from nemovl_train.model.vision import build_vision_tower
from nemovl_train.parallel.exchange import exchange_rows, gather_tokens
from nemovl_train.parallel.layout import Layout
from nemovl_train.parallel.tiles import deal, whole_places

# isort: split
# The backend module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule

ATTRIBUTES = {"vision": "vision_model", "projector": "projector", "language": "language_model"}
"""Attribute, and prefix of parameter names, of each part."""


class NemotronVL(MegatronModule):
    """Any of the three parts, and how they join. Absent parts are None.

    Args:
        config: Sizes.
        layout: Owner of the process groups.
        params_dtype: Dtype of the weights; A_log and D stay float32.
        backend: Provider of the leaf modules.
        parts: Parts to build.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        *,
        params_dtype: torch.dtype,
        backend: Backend,
        parts: Sequence[str],
    ) -> None:
        built: dict[str, MegatronModule] = {}
        if "vision" in parts:
            built["vision"] = build_vision_tower(config.vision, layout, params_dtype, backend)
        if "projector" in parts:
            built["projector"] = Projector(config, layout, params_dtype, backend)
        if "language" in parts:
            built["language"] = build_language_model(
                config.language, layout, params_dtype=params_dtype, backend=backend
            )
        # megatron-core's schedule and DDP ask the whole model for one config; the language model's is the widest.
        super().__init__(list(built.values())[-1].config)
        self.sizes = config
        self.layout = layout
        self.vision_model = built.get("vision")
        self.projector = built.get("projector")
        self.language_model = built.get("language")
        self.model_type = ModelType.encoder_or_decoder
        # From this rank's number of tiles to blank ones that go through the tower with them. For an engine whose
        # collectives are tied to module calls, so that every rank has to make equally many. Collective.
        self.blank_tiles: Callable[[int], int] | None = None

    def part_modules(self) -> dict[str, MegatronModule]:
        """The parts that are there, by name."""
        parts = {part: getattr(self, attribute) for part, attribute in ATTRIBUTES.items()}
        return {part: module for part, module in parts.items() if module is not None}

    def freeze(self, train: Sequence[str]) -> None:
        """Let only the named parts, and adapters, have gradients. Call it before DDP or an optimizer sees them.

        Args:
            train: Parts whose own weights train.

        Raises:
            ConfigError: A part is unknown or not in this model.
        """
        parts = self.part_modules()
        problems = [
            f"trainer.train names {part!r}, but the model has {', '.join(parts)}; remove it"
            for part in train
            if part not in parts
        ]
        if problems:
            raise ConfigError(problems)
        for part, module in parts.items():
            module.requires_grad_(part in train)
            for _, pair in adapters(module):
                pair.requires_grad_(True)

    def encode_tiles(self, tiles_T3PP: Tensor) -> Tensor:
        """Visual features in the language model's embedding space.

        Args:
            tiles_T3PP: [T, 3, P, P] uint8.

        Returns:
            [T, K, H].
        """
        assert self.vision_model is not None, "this model has no vision part"
        assert self.projector is not None, "this model has no projector"
        trained = any(parameter.requires_grad for parameter in self.vision_model.parameters())
        # Nothing is below the tower: a frozen one needs no graph, whatever its kernels would keep for a backward pass.
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = self.vision_model.encode(tiles_T3PP)
        return self.projector(features)

    def forward(self, batch: PackBatch, *, weights_are_final: bool = False) -> Tensor:
        """Cross entropy of every position, in nats; 0 where there is no label.

        Args:
            batch: One pack.
            weights_are_final: Backward will start from the sum of the losses times the batch's weights, as they are
                now, so that the head's gradients can be made in forward (`token_loss`).

        Returns:
            [L] float32.

        Raises:
            DataError: Image tokens and tiles do not belong together.
        """
        losses = self._language()(
            batch.input_ids,
            batch.params,
            batch.labels,
            self._embeddings(batch),
            batch.supervised,
            batch.loss_weight if weights_are_final else None,
        )
        if self.training and torch.is_grad_enabled() and not losses.requires_grad:
            # Nothing that trains took part (projector warm-up meets a pack without images). The trainer still runs a
            # backward pass, since other ranks do: let it end here, with no gradient for anyone.
            losses.requires_grad_()
        return losses

    def logits(self, batch: PackBatch, positions_M: Tensor | None = None) -> Tensor:
        """Logits of every position of the whole pack, or of some. For evaluation: it has no gradient over ranks.

        Args:
            batch: One pack.
            positions_M: [M] int64, positions that are asked for; all of them when None.

        Returns:
            [S, V] or [M, V] float32, the same on all ranks that share the pack.

        Raises:
            DataError: Image tokens and tiles do not belong together.
        """
        language = self._language()
        hidden = language.hidden_states(self._embeddings(batch), batch.params)
        if self.layout.cp > 1 or self.layout.sequence_parallel:
            return self._logits_across_ranks(hidden, positions_M)
        return language.logits(hidden if positions_M is None else hidden.index_select(0, positions_M))

    @torch.no_grad()
    def _logits_across_ranks(self, hidden: Tensor, positions_M: Tensor | None) -> Tensor:
        """The head over rows of all ranks: only once they are gathered do positions count over the whole pack."""
        if self.layout.sequence_parallel:
            hidden = gather_tokens(hidden, self.layout.language_groups.tp)
        hidden = gather_tokens(hidden, self.layout.language_groups.cp)
        return self._head(hidden if positions_M is None else hidden.index_select(0, positions_M))

    @torch.no_grad()
    def decode(
        self, input_ids: Tensor, pack: CachedParams, positions_M: Tensor, features: Tensor | None = None
    ) -> Tensor:
        """Logits of one pass over a decoding cache. Collective for the ranks that share the model.

        Every such rank gives all tokens of the pass: they share heads and columns here, but no tokens.

        Args:
            input_ids: [S] int64, a multiple of the tensor parallel size with sequence parallelism.
            pack: The pass; what it sees is added to its cache.
            positions_M: [M] int64, positions that are asked for.
            features: [F, H], in the order of the F image tokens among `input_ids`.

        Returns:
            [M, V] float32.
        """
        language, groups = self._language(), self.layout.language_groups
        embeddings = language.embed(input_ids)
        if features is not None:
            rows = (input_ids == self.sizes.tokens.image).nonzero()[:, 0]
            assert len(rows) == len(features), (len(rows), len(features))
            # With sequence parallelism the residual stream holds only a run of the tokens.
            rows = rows - len(embeddings) * groups.tp.rank() if self.layout.sequence_parallel else rows
            held = (rows >= 0) & (rows < len(embeddings))
            embeddings = embeddings.index_copy(0, rows[held], features[held].unsqueeze(1))
        hidden = language.hidden_states(embeddings, pack)
        if self.layout.sequence_parallel:
            hidden = gather_tokens(hidden, groups.tp)
        return self._head(hidden.index_select(0, positions_M))

    def _head(self, hidden: Tensor) -> Tensor:
        """[M, 1, H] -> [M, V] float32, whole on every tensor parallel rank."""
        head = self._language().output_layer
        collect_weights(head)
        logits = torch.nn.functional.linear(hidden.squeeze(1), head.weight).float()
        return gather_from_tensor_model_parallel_region(logits, group=head.tp_group)

    def _language(self) -> LanguageModel:
        assert self.language_model is not None, "this model has no language part"
        return self.language_model

    def _embeddings(self, batch: PackBatch) -> Tensor:
        """This rank's rows of the residual stream, those at image tokens replaced. Checks the batch first."""
        pack, vision, tokens = batch.pack, self.sizes.vision, self.sizes.tokens_per_tile
        batch.check_tiles(self.sizes.tokens.image, tokens, vision.tile_size)
        blanks = self.blank_tiles(batch.tiles.shape[0]) if self.blank_tiles is not None else 0
        if not pack.tiles.shape[0] and not blanks:
            # The tower does not run: image-free packs, ranks and stages cost nothing for it.
            return self._language().embed(batch.input_ids)
        if self.vision_model is None or self.projector is None:
            raise DataError(
                f"the pack with samples {list(pack.sample_keys)} has {pack.tiles.shape[0]} tiles, but this "
                "model has no vision tower and projector; use text-only data"
            )
        features = self._dealt_features(_with_blanks(batch.tiles, blanks, vision.tile_size))
        idle = None
        if blanks:
            features, idle = features.split([batch.tiles.shape[0] * tokens, blanks * tokens])
        layout, length = self.layout, len(pack.input_ids)
        input_ids, places = self._placed(batch, features)
        embeddings = self._language().embed(input_ids)
        if idle is not None:
            embeddings = embeddings + 0.0 * idle.sum()  # in the graph, for its backward calls
        held = [layout.residual_tokens(length, rank) for rank in range(layout.pack_ranks)]
        plan = deal(pack.tile_token_start, places, held, layout.pack_rank)
        rows = plan.rows.to(embeddings.device, non_blocking=True)
        if pack.tile_tokens is not None or layout.pack_ranks > 1:
            features = features.index_select(0, plan.outgoing.to(features.device, non_blocking=True))
        if layout.pack_ranks > 1:
            features = exchange_rows(features, plan.send, plan.receive, layout.language_groups.tp_cp)
        if features.requires_grad and layout.tp > 1 and not layout.sequence_parallel:
            _divide_gradient(features, layout.tp)
        return embeddings.index_copy(0, rows, features.unsqueeze(1))

    def _placed(self, batch: PackBatch, features: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's tokens [L], and on the host the position of each feature of the pack [T, K]."""
        pack, tokens = batch.pack, self.sizes.tokens_per_tile
        if pack.tile_tokens is None:
            return batch.input_ids, whole_places(pack.tile_token_start, tokens)
        by_tile = features.unflatten(0, (batch.tiles.shape[0], tokens))
        pruned = prune_videos(pack, by_tile, self.sizes.tokens.image, self.layout)
        own = self.layout.context_tokens(len(pack.input_ids))
        return pruned.input_ids[own.start : own.stop].to(batch.input_ids.device), pruned.places

    def _dealt_features(self, tiles: Tensor) -> Tensor:
        """Features [t * K, H] of this rank's tiles, in the graph even where there are none.

        Backward exchanges gradients, and every rank that shares the pack has to take part.
        """
        assert self.vision_model is not None
        assert self.projector is not None
        if tiles.shape[0]:
            return self.encode_tiles(tiles).flatten(0, 1)
        parameters = [*self.vision_model.parameters(), *self.projector.parameters()]
        empty = parameters[0].new_empty(0, self.sizes.language.hidden_size)
        return empty.requires_grad_(torch.is_grad_enabled() and any(p.requires_grad for p in parameters))

    def set_is_first_microbatch(self) -> None:
        """Called by megatron-core's schedules at the start of a step: weights are not those of the step before."""
        forget_quantized_weights(self)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Part of the protocol of megatron-core's schedules; there is no pipeline stage before this model."""
        assert input_tensor is None or input_tensor == [None]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Tensors for a distributed checkpoint, each under its parameter name.

        Tower and projector are replicas on all ranks, the language model is sharded over tensor parallel ranks and
        replicated over the rest: each part tells its copies apart by its own groups.

        Args:
            prefix: Put in front of every name.
            sharded_offsets: Passed through.
            metadata: Options of megatron-core's checkpointing, completed per part.
        """
        state: dict[str, Any] = {}
        for part, module in self.part_modules().items():
            groups = self.layout.language_groups if part == "language" else self.layout.vision_groups
            # Without the second entry megatron-core would stack the tower's layers into one tensor.
            own = {**(metadata or {}), "dp_cp_group": groups.dp_cp, "non_homogeneous_layers": True}
            state |= module.sharded_state_dict(f"{prefix}{ATTRIBUTES[part]}.", sharded_offsets, own)
            for name, pair in adapters(module):
                # The linear layer took both halves for whole; one is split.
                state |= pair.sharded_state_dict(f"{prefix}{ATTRIBUTES[part]}.{name}.")
        # Plain linears write empty entries there, Transformer Engine's would hold FP8 histories that we do not use.
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _with_blanks(tiles: Tensor, blanks: int, side: int) -> Tensor:
    """[t, 3, P, P] -> [t + blanks, 3, P, P], black ones at the end."""
    return torch.cat([tiles, tiles.new_zeros(blanks, 3, side, side)]) if blanks else tiles


def _divide_gradient(features: Tensor, copies: int) -> None:
    """All tensor parallel ranks hold these rows and the whole gradient of each; the owner gets the sum of `copies`."""
    features.register_hook(lambda gradient: gradient / copies)


def build_model(
    config: ModelConfig,
    layout: Layout,
    *,
    params_dtype: torch.dtype,
    backend: str = "auto",
    parts: Sequence[str] | None = None,
    seed: int = 1234,
    recompute: RecomputeConfig | None = None,
    precision: PrecisionConfig | None = None,
    draw_on: torch.device | str = "cpu",
) -> NemotronVL:
    """Build the model, or some of its parts, on this process's device with initial weights.

    Every value depends on the seed and the parameter's name alone: not on the layout, nor on which parts are built.

    Args:
        config: Sizes.
        layout: Owner of the process groups.
        params_dtype: Dtype of the weights; A_log and D stay float32.
        backend: `torch`, `te` or `auto`.
        parts: Parts to build; `config.parts` when None.
        seed: Seed of the initial weights.
        recompute: What backward makes again; nothing when None.
        precision: Which layers multiply in FP8; none when None. Its other options are `params_dtype` and `backend`.
        draw_on: Where initial values are drawn; only those of a CPU are the same on every machine.

    Raises:
        UserError: The backend is unknown or cannot run here, or FP8 cannot.
    """
    parts = config.parts if parts is None else parts
    assert set(parts) <= set(PARTS), f"parts are some of {PARTS}, not {parts}"
    leaves = select_backend(backend)
    fp8 = leaves.fp8_context() if precision is not None and precision.fp8 == "blockwise" else None
    model = NemotronVL(config, layout, params_dtype=params_dtype, backend=leaves, parts=parts)
    model.to(layout.device)  # megatron-core makes some of the tower's parameters on the CPU
    # Additions to the residual stream of each part: their number scales the projections that feed it.
    additions = {"vision": 2 * config.vision.num_layers, "projector": 1, "language": config.language.num_layers}
    for part, module in model.part_modules().items():
        groups = layout.language_groups if part == "language" else layout.vision_groups
        init_weights(
            module,
            seed=seed,
            std=config.language.init_std,
            prefix=f"{ATTRIBUTES[part]}.",
            residual_additions=additions[part],
            tp_size=groups.tp.size(),
            tp_rank=groups.tp.rank(),
            device=draw_on,
        )
    if precision is not None and fp8 is not None:
        multiply_in_fp8(_fp8_modules(model, precision), fp8)
    _set_recompute(model, recompute or RecomputeConfig())
    return model


def _fp8_modules(model: NemotronVL, precision: PrecisionConfig) -> Iterator[torch.nn.Module]:
    """All layers but those at both ends, and the projector. Embedding, head and patch embedding are no such layers."""
    if (language := model.language_model) is not None:
        yield from _without_ends(language.decoder.layers, precision.bf16_layers)
    if (tower := model.vision_model) is not None:
        yield from _without_ends(tower.decoder.layers, precision.bf16_blocks)
    if model.projector is not None:
        yield model.projector


def _without_ends(layers: torch.nn.ModuleList, ends: int) -> Iterator[torch.nn.Module]:
    return iter([layers[place] for place in inner_layers(len(layers), ends)])


def _set_recompute(model: NemotronVL, recompute: RecomputeConfig) -> None:
    if (language := model.language_model) is not None:
        if recompute.language in ("full", "offload"):
            host = Host() if recompute.language == "offload" else None
            recompute_fully(language.decoder.layers[: recompute.language_layers], host)
        elif recompute.language == "selective":
            recompute_selectively(language)
    if (tower := model.vision_model) is not None:
        if recompute.vision in ("full", "offload"):
            recompute_fully(tower.decoder.layers, Host() if recompute.vision == "offload" else None)
        elif recompute.vision == "selective":
            recompute_selectively(tower)
        tower.keeps_pixels_only = recompute.vision == "tiles"
