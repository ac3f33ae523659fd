"""The phases of `phases.py` on mamba-ssm's Triton kernels and causal-conv1d. Imported only where both are installed.

Which kernel follows which is what mamba-ssm's own `ops/triton/ssd_combined.py` (2.3.2.post1) does in one go; here the
state passing in the middle waits for what other pieces and ranks have to say.

Shape legend: S tokens of the piece, C chunks, D channels of the convolution, W taps, G groups, H heads, P head width,
N state width. The kernels want a batch dimension of 1 in front.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function
from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_bwd, _layer_norm_fwd
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd
from mamba_ssm.ops.triton.ssd_chunk_scan import (
    _chunk_scan_bwd_dC,
    _chunk_scan_bwd_dcb,
    _chunk_scan_bwd_ddAcs_stable,
    _chunk_scan_bwd_dstates,
    _chunk_scan_fwd,
)
from mamba_ssm.ops.triton.ssd_chunk_state import (
    _chunk_cumsum_bwd,
    _chunk_cumsum_fwd,
    _chunk_state_bwd_db,
    _chunk_state_fwd,
)
from mamba_ssm.ops.triton.ssd_combined import _chunk_scan_chunk_state_bwd_dx
from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_bwd, _state_passing_fwd
from torch import Tensor

from nemovl_train.model.kernels.phases import ScanInputs, TokenGradients


class _Chunks:
    """What both directions need of a piece: step sizes, decays, and the states that its chunks add."""

    def __init__(self, inputs: ScanInputs) -> None:
        i = self.inputs = inputs
        self.x, self.dt, self.b, self.c = (t.unsqueeze(0) for t in (i.x, i.dt, i.b, i.c))
        # Both [1, H, C, chunk] float32: log decay since the start of the chunk, and the step after bias and softplus.
        self.log_decay, self.step = _chunk_cumsum_fwd(self.dt, i.a, i.chunk_size, dt_bias=i.dt_bias, dt_softplus=True)
        self.chunk_log_decay = self.log_decay[..., -1]
        self._products: Tensor | None = None

    def added(self) -> Tensor:
        """[1, C, H, P, N] float32, what each chunk adds to the state of its last token's document."""
        return _chunk_state_fwd(self.b, self.x, self.step, self.log_decay, seq_idx=self.inputs.ids, states_in_fp32=True)

    def before(self, added: Tensor, entering: Tensor, dtype: torch.dtype) -> Tensor:
        """[1, C, H, P, N], the state before each chunk."""
        states, _ = _state_passing_fwd(
            added.flatten(3),
            self.chunk_log_decay,
            initial_states=entering.flatten(1).unsqueeze(0),
            seq_idx=self.inputs.ids,
            chunk_size=self.inputs.chunk_size,
            out_dtype=dtype,
        )
        return states.unflatten(3, added.shape[3:])

    def products(self) -> Tensor:
        """[1, C, G, chunk, chunk] float32, every c with every b of its chunk."""
        if self._products is None:
            self._products = _bmm_chunk_fwd(
                self.c, self.b, self.inputs.chunk_size, seq_idx=self.inputs.ids, output_dtype=torch.float32
            )
        return self._products

    def last_ids(self) -> Tensor:
        """[C], document of each chunk's last token."""
        ids, size = self.inputs.ids[0], self.inputs.chunk_size
        ends = ids[size - 1 :: size]
        return ends if len(ids) % size == 0 else torch.cat([ends, ids[-1:]])


def _weighted_sum(weights_HC: Tensor, states: Tensor) -> Tensor:
    """Sum over chunks of [1, C, H, P, N] with a weight per head and chunk: [H, P, N]."""
    by_head = states[0].flatten(2).transpose(0, 1)
    return torch.bmm(weights_HC.unsqueeze(1), by_head).view(states.shape[2:])


class ForwardScan:
    """Forward over one piece; see `phases.ForwardScan`."""

    def __init__(self, inputs: ScanInputs) -> None:
        self._chunks = _Chunks(inputs)
        self._added = self._chunks.added()

    def summary(self) -> tuple[Tensor, Tensor]:
        """State after the piece from zero [H, P, N], and what is left of a state before it [H]."""
        log_HC, ends = self._chunks.chunk_log_decay[0], self._chunks.last_ids()
        # Summed from the end: differences of running sums from the start would lose the small ones, which matter.
        after_HC = F.pad(log_HC[:, 1:], (0, 1)).flip(1).cumsum(1).flip(1)
        added = _weighted_sum(after_HC.exp() * (ends == ends[-1]), self._added)
        return added, log_HC.sum(1).exp() * (ends[-1] == 0)

    def independent(self) -> None:
        """Products of c and b."""
        self._chunks.products()

    def outputs(self, entering: Tensor) -> Tensor:
        """[S, H, P]."""
        k = self._chunks
        before = k.before(self._added, entering, k.c.dtype)
        del self._added
        y, _ = _chunk_scan_fwd(
            k.products(), k.x, k.step, k.log_decay, k.c, before, D=k.inputs.d, z=None, seq_idx=k.inputs.ids
        )
        return y.squeeze(0)


class BackwardScan:
    """Backward over one piece; see `phases.BackwardScan`."""

    def __init__(self, inputs: ScanInputs, entering: Tensor, grad: Tensor) -> None:
        self._chunks, self._entering, self._grad = _Chunks(inputs), entering, grad.unsqueeze(0)
        # [1, C, H, P, N] float32, gradient of the state before each chunk from the outputs of that chunk.
        self._grad_before = _chunk_scan_bwd_dstates(
            self._chunks.c, self._chunks.log_decay, self._grad, seq_idx=inputs.ids, dtype=torch.float32
        )

    def entering(self) -> Tensor:
        """[H, P, N] float32."""
        log_HC, ends = self._chunks.chunk_log_decay[0], self._chunks.last_ids()
        until_HC = F.pad(log_HC[:, :-1], (1, 0)).cumsum(1)
        reached = F.pad(ends[:-1] == 0, (1, 0), value=True)
        return _weighted_sum(until_HC.exp() * reached, self._grad_before)

    def independent(self) -> None:
        """Products of c and b."""
        self._chunks.products()

    def gradients(self, leaving: Tensor, into: TokenGradients) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a, d and dt_bias [H]; the others are written where `into` says."""
        k, i, grad = self._chunks, self._chunks.inputs, self._grad
        groups, products = i.b.shape[1], k.products()
        before = k.before(k.added(), self._entering, torch.float32)
        grad_added, grad_chunk_log, _, before = _state_passing_bwd(
            before.flatten(3),
            k.chunk_log_decay,
            self.__dict__.pop("_grad_before").flatten(3),
            dfinal_states=leaving.flatten(1).unsqueeze(0),
            seq_idx=i.ids,
            has_initial_states=True,
            dstates_dtype=i.x.dtype,
            states_dtype=i.x.dtype,
            chunk_size=i.chunk_size,
        )
        grad_added, before = (t.unflatten(3, self._entering.shape[1:]) for t in (grad_added, before))
        common = (k.step, k.log_decay)
        _, step, d = _chunk_scan_chunk_state_bwd_dx(
            k.x, *common, k.b, products, grad, grad_added, D=i.d, seq_idx=i.ids, dx=into.x.unsqueeze(0)
        )
        b, log_from_added = _chunk_state_bwd_db(k.x, *common, grad_added, seq_idx=i.ids, B=k.b, ngroups=groups)
        c, log_from_before = _chunk_scan_bwd_dC(
            before.to(i.x.dtype), k.log_decay, grad, seq_idx=i.ids, C=k.c, ngroups=groups
        )
        grad_products = _chunk_scan_bwd_dcb(k.x, *common, grad, seq_idx=i.ids, ngroups=groups).to(products.dtype)
        _bmm_chunk_bwd(k.c, grad_products, residual=b, out=into.b.unsqueeze(0))
        _bmm_chunk_bwd(k.b, grad_products.transpose(-1, -2), residual=c, out=into.c.unsqueeze(0))
        # A log decay counts in all sums after it: gradients of the sums are added up from the end.
        log_from_before[..., -1] += grad_chunk_log
        log = log_from_before.flip(-1).cumsum(-1).flip(-1)
        log += _chunk_scan_bwd_ddAcs_stable(k.x, *common, grad, products) + log_from_added
        _, a, dt_bias = _chunk_cumsum_bwd(
            log, step, k.dt, i.a, dt_bias=i.dt_bias, dt_softplus=True, ddt=into.dt.unsqueeze(0)
        )
        return a, d, dt_bias


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, halo: Callable[[], Tensor], halo_ids: Tensor
) -> Tensor:
    """Convolution and SiLU of a piece; see `phases.conv_forward`."""
    out = _conv(x, weight, bias, ids)
    before = halo()
    if len(before):
        # The kernel has no states before a pack with document numbers. Only the first outputs see the halo: they are
        # made again, from a sequence of their own, instead of copying the whole piece behind its halo.
        first, first_ids = _around_start(x, ids, before, halo_ids)
        out[: len(before)] = _conv(first, weight, bias, first_ids)[len(before) :]
    return out


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, halo: Tensor, halo_ids: Tensor, *, into: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and halo; writes over `grad`, and that of x to `into`. See `phases.conv_backward`."""
    reach = len(halo)
    if not reach:
        return *_conv_backward(grad, x, weight, bias, ids, into), torch.empty_like(halo)
    first, first_ids = _around_start(x, ids, halo, halo_ids)
    first_grad = torch.cat([torch.zeros_like(grad[:reach]), grad[:reach]])
    grad[:reach] = 0
    grad_weight, grad_bias = _conv_backward(grad, x, weight, bias, ids, into)
    grad_first = torch.empty_like(first)
    first_weight, first_bias = _conv_backward(first_grad, first, weight, bias, first_ids, grad_first)
    into[:reach] += grad_first[reach:]
    return grad_weight + first_weight, grad_bias + first_bias, grad_first[:reach]


def _around_start(x: Tensor, ids: Tensor, halo: Tensor, halo_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Halo and as many tokens after it, with document numbers from 0: the kernel takes negative ones for padding."""
    numbers = torch.cat([halo_ids, ids[0, : len(halo)]])
    return torch.cat([halo, x[: len(halo)]]), (numbers - numbers[0])[None].contiguous()


def _conv(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    # The kernel takes document numbers only in its channels-last form: [1, D, S] with D contiguous.
    out = causal_conv1d_fwd_function(_aligned(x).t().unsqueeze(0), weight, bias, ids, None, None, True)
    return out.squeeze(0).t()


def _aligned(x: Tensor) -> Tensor:
    """The kernel reads rows in units of eight; columns of a projection of odd width are copied first."""
    return x if x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, into: Tensor
) -> tuple[Tensor, Tensor]:
    place = _aligned(into)
    x_1DS, grad_1DS, into_1DS = (t.t().unsqueeze(0) for t in (_aligned(x), grad, place))
    _, grad_weight, grad_bias, _ = causal_conv1d_bwd_function(
        *(x_1DS, weight, bias, grad_1DS, ids, None, None, into_1DS, False, True)
    )
    if place is not into:
        into.copy_(place)
    return grad_weight, grad_bias


def gated_norm_forward(y: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float, *, into: Tensor) -> Tensor:
    """Writes [S, D] and returns the reciprocal root mean squares; see `phases.gated_norm_forward`."""
    *_, rstd = _layer_norm_fwd(
        y, weight, None, eps, gate, out=into, group_size=group_size, norm_before_gate=False, is_rms_norm=True
    )
    return rstd


def gated_norm_backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, kept: Tensor, group_size: int, eps: float, *, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and weight; that of the gate goes to `into`. See `phases.gated_norm_backward`."""
    grad_y, grad_weight, *_ = _layer_norm_bwd(
        *(grad.contiguous(), y, weight, None, eps, None, kept, gate),
        group_size=group_size,
        norm_before_gate=False,
        is_rms_norm=True,
        dz=into,
    )
    return grad_y, grad_weight
