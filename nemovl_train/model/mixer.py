"""The Mamba-2 mixer: megatron-core's parameters and checkpoint layout, our forward over packs on any number of ranks.

Between its two projections the layer convolves, scans and norms along the tokens of every document:

    h_t = exp(dt_t a) h_(t-1) + dt_t b_t x_t        y_t = c_t h_t + d x_t        per head, h [P, N]

Context parallel ranks hold runs of tokens, L = S / R each, in the pack's own order. Two forms:

*State passing* (`_ScanAcrossRanks`), the default. The recurrence is linear in the state, so a run of tokens acts on the
state before it as `h_after = left * h_before + added`: `added` is the state after the run when it starts from zero,
`left` the product of its decays (zero where a document starts in the run). Every rank finds its own pair without
waiting; one all-gather makes all pairs known; rank r then has

    h_before(r) = sum over j < r of  left(j + 1) ... left(r - 1) * added(j)

and finishes its outputs. The convolution sees the last taps - 1 tokens of the rank before. Backward is the same read
from the end: with g(r) the gradient of h_before(r) if no later rank had any,

    grad h_after(r) = sum over j > r of  left(r + 1) ... left(j - 1) * g(j)

What travels is two states a layer, whatever the length. The gradients of the decays need no exchange of their own:
each lies inside one rank's recurrence, whose true first state and last gradient are known by then.

*Head exchange* gives every rank all tokens of its share of the heads by one all-to-all, and the tokens back by another.

The kernels count elements in 32 bits. Runs that are too long for that are cut into pieces, and the pieces of a rank are
to each other what ranks are: same pairs, no exchange.

Shape legend: S tokens in a pack, L of this rank, R ranks, E hidden, H heads, P head width, G groups, N state width,
W taps. Sizes are this tensor parallel rank's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemovl_train.model import cache
from nemovl_train.model.fp8 import in_fp8
from nemovl_train.model.kernels import dispatch
from nemovl_train.model.kernels.phases import ScanInputs, TokenGradients
from nemovl_train.model.mamba_parts import GatedNorm, MambaParameters, MambaSizes, mark_split
from nemovl_train.model.packing import PackParams, Piece
from nemovl_train.model.recompute import can_be_remade
from nemovl_train.parallel import cpu
from nemovl_train.parallel.exchange import Gathered, every_rank, gather_columns, scatter_columns

cpu.install_if_no_cuda()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

# Fixed in the released models: megatron-core and the Hugging Face model hard-code it too.
GATED_NORM_EPS = 1e-5


class PackedMambaMixer(MambaMixer):
    """megatron-core's `MambaMixer` for packs, on any device and any number of context parallel ranks.

    It keeps the parent's parameter names, their tensor parallel partition (`partition_sizes`: z, x, B, C, dt are split
    one by one) and `sharded_state_dict`. The parent's constructor needs mamba-ssm and CUDA, and its forward handles
    inference; both are replaced. Values of parameters come from `init.py` or a checkpoint.

    Dtypes: A_log and D are float32, dt_bias and the rest `config.params_dtype`; A and dt are computed in float32.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
        d_conv: int = 4,
        chunk_size: int = 128,
        context: str = "state_passing",
    ) -> None:
        MegatronModule.__init__(self, config)
        assert pg_collection is not None
        assert config.mamba_num_heads is not None
        assert context in ("state_passing", "head_exchange")
        self.layer_number, self.pp_layer_offset = layer_number, pp_layer_offset
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.remakes_gated_norm = False
        self.exchanges_heads = context == "head_exchange" and self.cp_group.size() > 1
        self.chunk_size, self.d_conv, self.d_model = chunk_size, d_conv, d_model
        self.headdim, self.d_state = config.mamba_head_dim, config.mamba_state_dim
        self.nheads, self.ngroups = config.mamba_num_heads, config.mamba_num_groups
        self.d_inner = self.nheads * self.headdim
        # The parent's `train()` marks its inference cache stale through this name.
        self._A_neg_exp_cache_stale = True

        tp = self.tp_group.size()
        assert self.nheads % tp == 0
        assert self.ngroups % tp == 0
        assert self.nheads % self.ngroups == 0
        self.sizes = MambaSizes(
            heads=self.nheads // tp,
            head_dim=self.headdim,
            groups=self.ngroups // tp,
            state=self.d_state,
            taps=d_conv,
            chunk=chunk_size,
        )
        # Names that the parent's `sharded_state_dict` reads.
        self.nheads_local_tp, self.ngroups_local_tp = self.sizes.heads, self.sizes.groups
        self.d_inner_local_tp = self.sizes.inner
        self._build_projections(submodules)
        self._build_parameters()

    def _build_projections(self, submodules: MambaMixerSubmodules) -> None:
        common = {"config": self.config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            self.d_model,
            sum(self.sizes.columns) * self.tp_group.size(),
            init_method=self.config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.in_proj.weight.partition_sizes = self.sizes.columns
        self.out_proj = build_module(
            submodules.out_proj,
            self.d_inner,
            self.d_model,
            init_method=self.config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def _build_parameters(self) -> None:
        def empty(*shape: int, dtype: torch.dtype = self.config.params_dtype) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(*shape, dtype=dtype, device=torch.cuda.current_device()))
            mark_split(parameter)
            return parameter

        channels = self.sizes.channels
        self.conv1d_weight = empty(sum(channels), 1, self.d_conv)
        self.conv1d_bias = empty(sum(channels))
        for parameter in (self.conv1d_weight, self.conv1d_bias):
            parameter.partition_sizes = channels  # type: ignore[attr-defined]
        self.dt_bias = empty(self.sizes.heads)
        self.A_log = empty(self.sizes.heads, dtype=torch.float32)
        self.D = empty(self.sizes.heads, dtype=torch.float32)
        self.norm = GatedNorm(self.config, self.sizes.inner, self.tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: None = None,
        *,
        inference_params: None = None,
        packed_seq_params: PackParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixes along the documents of a pack.

        Args:
            hidden_states: [L, 1, E]; the rank's part of L with sequence parallelism.
            inference_context: Must be None: decoding hands its state on in `CachedParams`.
            inference_params: Must be None.
            packed_seq_params: Boundaries of the pack. Without them states would leak from sample to sample.

        Returns:
            [L, 1, E], and no bias.
        """
        assert inference_context is None
        assert inference_params is None
        assert getattr(packed_seq_params, "seq_idx", None) is not None, "a Mamba layer needs seq_idx"
        assert packed_seq_params is not None
        projected, _ = self.in_proj(hidden_states)
        assert projected.shape[1] == 1, "packs are the only batch"
        projected, parameters = projected.squeeze(1), self._parameters_outside_projections()
        # In FP8 the projection keeps a copy of its own, and the fused call is faster.
        remakes = self.remakes_gated_norm and not self.exchanges_heads and not in_fp8(self.in_proj)
        if isinstance(packed_seq_params, cache.CachedParams):
            assert self.layer_number is not None
            inner = cache.mamba_inner(
                projected,
                parameters,
                self.sizes,
                eps=GATED_NORM_EPS,
                layer=self.layer_number,
                params=packed_seq_params,
            )
        elif self.exchanges_heads:
            inner = self._over_heads(projected, parameters, packed_seq_params)
        else:
            inner = _inner(projected, parameters, self.sizes, packed_seq_params, self.cp_group, by_phases=remakes)
        inner, node = inner.unsqueeze(1), inner.grad_fn
        if remakes and node is not None:
            inner = can_be_remade(inner, lambda into: _ScanAcrossRanks.norm_again(node, into.squeeze(1)))
        return self.out_proj(inner)

    def rehearse(self, tokens: int) -> None:
        """Run what lies between the projections once on random numbers, forward and backward, without other ranks.

        The kernels are those that `forward` runs, at the same sizes; parameters and their gradients are not touched.

        Args:
            tokens: Tokens of this context parallel rank.
        """
        ranks = self.cp_group.size()
        # Not by calling the norm: that would ask other ranks for updated weights.
        parameters, sizes = self._parameters_with(self.norm.weight), self.sizes
        if self.exchanges_heads:
            parameters, sizes, tokens = parameters.share(sizes, 0, ranks), sizes.shared(ranks), tokens * ranks
        own = MambaParameters(*(p.detach().clone().requires_grad_() for p in parameters.tensors()))
        weight = own.conv_weight
        projected = torch.randn(tokens, sum(sizes.columns), dtype=weight.dtype, device=weight.device)
        ids = torch.zeros(1, tokens, dtype=torch.int32, device=weight.device)
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=weight.device)
        pack = PackParams.from_boundaries(bounds, ids, tokens)
        handed_on = ranks > 1 and not self.exchanges_heads
        # Of layers that make the norm again, those in FP8 take the other form.
        for by_phases in {handed_on, handed_on or self.remakes_gated_norm}:
            out = _inner(projected.detach().requires_grad_(), own, sizes, pack, None, by_phases=by_phases)
            out.backward(torch.randn_like(out))

    def _over_heads(self, projected: Tensor, parameters: MambaParameters, pack: PackParams) -> Tensor:
        """[L, all columns] -> [L, H * P], every rank scanning all tokens with its share of the heads."""
        ranks = self.cp_group.size()
        parts = projected.split(self.sizes.columns, dim=1)
        whole = torch.cat(scatter_columns(parts, self.cp_group), dim=1)
        own = parameters.share(self.sizes, self.cp_group.rank(), ranks)
        return gather_columns(_inner(whole, own, self.sizes.shared(ranks), pack, None), self.cp_group)

    def _parameters_outside_projections(self) -> MambaParameters:
        return self._parameters_with(self.norm())

    def _parameters_with(self, norm_weight: Tensor) -> MambaParameters:
        conv = (self.conv1d_weight.squeeze(1), self.conv1d_bias)
        return MambaParameters(*conv, self.dt_bias, self.A_log, self.D, norm_weight)


def _inner(
    projected: Tensor,
    parameters: MambaParameters,
    sizes: MambaSizes,
    pack: PackParams,
    group: dist.ProcessGroup | None,
    *,
    by_phases: bool = False,
) -> Tensor:
    """Convolution, scan and gated norm of the tokens that are here: [L, all columns] -> [L, H * P].

    Args:
        projected: Output of the input projection.
        parameters: Those of the columns that are here.
        sizes: Sizes of these columns.
        pack: Boundaries.
        group: Ranks that hold the rest of the pack; None when all tokens are here.
        by_phases: Take the form whose norm can be made again, even where nothing is handed on.
    """
    pieces = pack.pieces(whole=group is None, longest=sizes.longest_piece, halo=sizes.taps - 1)
    if group is not None and group.size() == 1:
        group = None
    if len(pieces) > 1 or group is not None or by_phases:
        return _ScanAcrossRanks.apply(projected, *parameters.tensors(), sizes, pieces, group)
    return dispatch.mamba_inner(
        projected,
        conv_weight=parameters.conv_weight,
        conv_bias=parameters.conv_bias,
        a_log=parameters.a_log,
        d=parameters.d,
        dt_bias=parameters.dt_bias,
        norm_weight=parameters.norm_weight,
        seq_idx=pieces[0].ids,
        head_dim=sizes.head_dim,
        num_groups=sizes.groups,
        chunk_size=sizes.chunk,
        eps=GATED_NORM_EPS,
    )


class _ScanAcrossRanks(torch.autograd.Function):
    """Convolution, scan and gated norm with states handed from piece to piece and from rank to rank.

    Keeps the projection's output, the scan's and one state a piece; backward convolves and scans again.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, *rest: Any) -> Tensor:
        *tensors, sizes, pieces, group = rest
        kernels, parameters = dispatch.phases(projected), MambaParameters(*tensors)
        halos = _halos(sizes.split(projected)[1], sizes.taps - 1, pieces, group)
        scans = [
            kernels.ForwardScan(_scan_inputs(projected, parameters, sizes, piece, halo))
            for piece, halo in zip(pieces, halos, strict=True)
        ]
        states, piece_lefts, rank_lefts = _states_before(scans, group)
        gate, out = sizes.split(projected)[0], projected.new_empty(len(projected), sizes.inner)
        scanned = [scan.outputs(state).flatten(1) for scan, state in zip(scans, states, strict=True)]
        kept = [
            kernels.gated_norm_forward(
                *(y, gate[piece.tokens], parameters.norm_weight, sizes.group_size, GATED_NORM_EPS),
                into=out[piece.tokens],
            )
            for y, piece in zip(scanned, pieces, strict=True)
        ]
        ctx.save_for_backward(projected, *tensors, halos[0](), piece_lefts, rank_lefts, *scanned, *kept, *states)
        ctx.sizes, ctx.pieces, ctx.group = sizes, pieces, group
        return out

    @staticmethod
    def norm_again(ctx: Any, into: Tensor) -> None:
        """The output once more, [L, H * P], from the scan's."""
        sizes, pieces = ctx.sizes, ctx.pieces
        projected, weight = ctx.saved_tensors[0], ctx.saved_tensors[6]
        kernels, gate = dispatch.phases(projected), sizes.split(projected)[0]
        for piece, y in zip(pieces, ctx.saved_tensors[10:], strict=False):
            kernels.gated_norm_forward(
                *(y, gate[piece.tokens], weight, sizes.group_size, GATED_NORM_EPS), into=into[piece.tokens]
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, pieces, group = ctx.sizes, ctx.pieces, ctx.group
        saved = iter(ctx.saved_tensors)
        projected, parameters = next(saved), MambaParameters(*itertools.islice(saved, 6))
        halo, piece_lefts, rank_lefts = itertools.islice(saved, 3)
        scanned, kept, states = (list(itertools.islice(saved, len(pieces))) for _ in range(3))
        kernels = dispatch.phases(projected)
        gate, mixed, _ = sizes.split(projected)
        grad_projected = torch.empty_like(projected)
        grad_gate, grad_mixed, grad_dt = sizes.split(grad_projected)

        halos = [halo, *_inner_halos(mixed, sizes.taps - 1, pieces)]
        scans, of_norm = [], []
        for piece, before, y, keep, state in zip(pieces, halos, scanned, kept, states, strict=True):
            grad_y, grad_norm = kernels.gated_norm_backward(
                *(grad[piece.tokens], y, gate[piece.tokens], parameters.norm_weight, keep),
                *(sizes.group_size, GATED_NORM_EPS),
                into=grad_gate[piece.tokens],
            )
            of_norm.append(grad_norm)
            inputs = _scan_inputs(projected, parameters, sizes, piece, partial(_itself, before))
            scans.append(kernels.BackwardScan(inputs, state, grad_y.unflatten(1, (-1, sizes.head_dim))))
        after = _gradients_after(scans, piece_lefts, rank_lefts, group)
        # Gradient of what the convolution gave; the scans fill it before it goes through the convolution.
        grad_conv = mixed.new_empty(mixed.shape)
        of_scan = []
        for piece, scan, leaving in zip(pieces, scans, after, strict=True):
            x, b, c = sizes.states(grad_conv[piece.tokens])
            of_scan.append(scan.gradients(leaving, TokenGradients(x, grad_dt[piece.tokens], b, c)))
        grad_weight, grad_bias = _conv_gradients(grad_conv, mixed, parameters, pieces, halos, grad_mixed, group)
        grad_a, grad_d, grad_dt_bias = (sum(parts) for parts in zip(*of_scan, strict=True))
        grad_a_log = -grad_a * torch.exp(parameters.a_log.float())
        of_parameters = (grad_weight, grad_bias, grad_dt_bias, grad_a_log, grad_d, sum(of_norm))
        return grad_projected, *of_parameters, None, None, None


def _scan_inputs(
    projected: Tensor, parameters: MambaParameters, sizes: MambaSizes, piece: Piece, halo: Callable[[], Tensor]
) -> ScanInputs:
    """Convolves a piece and names what its scan reads."""
    _, mixed, dt = (part[piece.tokens] for part in sizes.split(projected))
    convolved = dispatch.phases(projected).conv_forward(
        mixed, parameters.conv_weight, parameters.conv_bias, piece.ids, halo, piece.halo_ids
    )
    x, b, c = sizes.states(convolved)
    a = -torch.exp(parameters.a_log.float())
    return ScanInputs(x, dt, a, b, c, parameters.d.float(), parameters.dt_bias.float(), piece.ids, sizes.chunk)


def _halos(
    mixed: Tensor, reach: int, pieces: list[Piece], group: dist.ProcessGroup | None
) -> list[Callable[[], Tensor]]:
    """What gives the tokens before each piece that its convolution sees, [W - 1, D]; [0, D] at the start of the pack.

    Those of the rank before are on their way until they are asked for.
    """
    first = partial(_itself, mixed[:0])
    if group is not None:
        gathering, rank = every_rank(mixed[-reach:], group), group.rank()
        first = partial(_of_rank_before, gathering, rank, mixed[:0])
    return [functools.cache(first), *(partial(_itself, halo) for halo in _inner_halos(mixed, reach, pieces))]


def _itself(halo: Tensor) -> Tensor:
    return halo


def _of_rank_before(gathering: Gathered, rank: int, none: Tensor) -> Tensor:
    ends = gathering.wait()
    return ends[rank - 1] if rank else none


def _inner_halos(mixed: Tensor, reach: int, pieces: list[Piece]) -> list[Tensor]:
    return [mixed[piece.tokens.start - reach : piece.tokens.start] for piece in pieces[1:]]


def _states_before(scans: list[Any], group: dist.ProcessGroup | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """The exclusive scan of the module's docstring, forward.

    Returns:
        State before each piece [H, P, N] float32; `left` of each piece, and of each rank [R, H].
    """
    pairs = [scan.summary() for scan in scans]
    added, left = pairs[0]
    for more, kept in pairs[1:]:
        added, left = more + _per_head(kept) * added, left * kept
    gathering = None if group is None else every_rank(torch.cat([added.flatten(), left]), group)
    for scan in scans:
        scan.independent()
    state, rank_lefts = torch.zeros_like(added), left.unsqueeze(0)
    if group is not None and gathering is not None:
        addeds, rank_lefts = gathering.wait().split([added.numel(), left.numel()], dim=1)
        rank = group.rank()
        if rank:
            passed = rank_lefts[1:rank].flip(0).cumprod(0).flip(0)
            weights = torch.cat([passed, torch.ones_like(rank_lefts[:1])])
            state = torch.einsum("rh,rhs->hs", weights, addeds[:rank].unflatten(1, (len(left), -1))).view_as(added)
    states = [state]
    for more, kept in pairs[:-1]:
        states.append(more + _per_head(kept) * states[-1])
    return states, torch.stack([kept for _, kept in pairs]), rank_lefts


def _gradients_after(
    scans: list[Any], piece_lefts: Tensor, rank_lefts: Tensor, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """The same from the end: gradient of the state after each piece [H, P, N]."""
    own = [scan.entering() for scan in scans]
    total = own[-1]
    for grad, left in zip(reversed(own[:-1]), reversed(piece_lefts[:-1]), strict=True):
        total = grad + _per_head(left) * total
    gathering = None if group is None else every_rank(total, group)
    for scan in scans:
        scan.independent()
    last = torch.zeros_like(total)
    if group is not None and gathering is not None:
        totals, rank = gathering.wait(), group.rank()
        if rank < group.size() - 1:
            passed = rank_lefts[rank + 1 : -1].cumprod(0)
            weights = torch.cat([torch.ones_like(rank_lefts[:1]), passed])
            last = torch.einsum("rh,rhpn->hpn", weights, totals[rank + 1 :])
    after = [last]
    for grad, left in zip(reversed(own[1:]), reversed(piece_lefts[1:]), strict=True):
        after.append(grad + _per_head(left) * after[-1])
    return after[::-1]


def _conv_gradients(
    grad: Tensor,
    mixed: Tensor,
    parameters: MambaParameters,
    pieces: list[Piece],
    halos: list[Tensor],
    into: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Backward of the convolution over all pieces; that of its input goes to `into`.

    Returns:
        Gradients of weight and bias.
    """
    kernels, reach = dispatch.phases(mixed), parameters.conv_weight.shape[1] - 1
    found = []
    for number, (piece, halo) in enumerate(zip(pieces, halos, strict=True)):
        *of_parameters, grad_halo = kernels.conv_backward(
            *(grad[piece.tokens], mixed[piece.tokens], parameters.conv_weight, parameters.conv_bias),
            *(piece.ids, halo, piece.halo_ids),
            into=into[piece.tokens],
        )
        found.append(of_parameters)
        if number:
            into[piece.tokens.start - reach : piece.tokens.start] += grad_halo
        else:
            for_rank_before = grad_halo
    if group is not None:
        if not len(for_rank_before):
            for_rank_before = torch.zeros_like(mixed[:reach])
        of_next = every_rank(for_rank_before, group).wait()
        if group.rank() < group.size() - 1:
            into[-reach:] += of_next[group.rank() + 1]
    weight, bias = (sum(parts) for parts in zip(*found, strict=True))
    return weight, bias


def _per_head(left: Tensor) -> Tensor:
    return left[:, None, None]
