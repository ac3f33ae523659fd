"""Mamba-2's kernels on whatever device the tensors are.

mamba-ssm and causal-conv1d on CUDA where both are installed, `reference` elsewhere.

Both understand `seq_idx`, apply the gate before the norm, add the epsilon they are given and never clamp dt.

Shape legend: S tokens in a pack, D channels of the convolution, W taps, G groups, H heads, P head width, N state width.
"""

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from nemovl_train.model.kernels import reference


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
    """Depthwise causal convolution and SiLU, reset at document boundaries; see `reference.causal_conv`."""
    if not _has_kernels(x):
        return reference.causal_conv(x, weight, bias, seq_idx)
    from causal_conv1d import causal_conv1d_fn

    # The kernel takes seq_idx only in its channels-last form: [1, D, S] with D contiguous, which the transpose is.
    out = causal_conv1d_fn(x.t().unsqueeze(0), weight, bias, seq_idx=_kernel_ids(seq_idx), activation="silu")
    return out.squeeze(0).t()


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan, its state reset at document boundaries; see `reference.chunk_scan`."""
    if not _has_kernels(x):
        return reference.chunk_scan(
            x, dt, a, b, c, d=d, dt_bias=dt_bias, seq_idx=seq_idx, chunk_size=chunk_size, initial_state=initial_state
        )
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, last = mamba_chunk_scan_combined(
        *(t.unsqueeze(0) for t in (x, dt)),
        a,
        *(t.unsqueeze(0) for t in (b, c)),
        chunk_size,
        D=d,
        dt_bias=dt_bias,
        initial_states=None if initial_state is None else initial_state.unsqueeze(0),
        seq_idx=_kernel_ids(seq_idx),
        dt_softplus=True,
        return_final_states=True,
    )
    return y.squeeze(0), last.squeeze(0)


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, *, group_size: int, eps: float) -> Tensor:
    """RMSNorm by groups of y * silu(gate); see `reference.gated_rms_norm`."""
    if not _has_kernels(y):
        return reference.gated_rms_norm(y, gate, weight, group_size=group_size, eps=eps)
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(y, weight, None, z=gate, eps=eps, group_size=group_size, norm_before_gate=False)


def mamba_inner(
    projected: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    seq_idx: Tensor,
    head_dim: int,
    num_groups: int,
    chunk_size: int,
    eps: float,
) -> Tensor:
    """All of a Mamba-2 layer between its two projections: convolution, scan, gated norm.

    On CUDA this is one kernel call that keeps its input, the scan's output and the norm's statistics for backward.

    Args:
        projected: [S, 2 * H * P + 2 * G * N + H], columns z, x, B, C, dt.
        conv_weight: [D, W] with D = H * P + 2 * G * N.
        conv_bias: [D].
        a_log: [H] float32, A = -exp(a_log).
        d: [H] float32.
        dt_bias: [H].
        norm_weight: [H * P].
        seq_idx: [1, S] int32, number of the document of every token.
        head_dim: P.
        num_groups: G; B and C, and the norm's mean squares, are per group.
        chunk_size: Tokens of a scan chunk.
        eps: Epsilon of the norm.

    Returns:
        [S, H * P], dtype of `projected`.
    """
    a = -torch.exp(a_log.float())
    if _has_kernels(projected):
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        out = mamba_split_conv1d_scan_combined(
            projected.unsqueeze(0),
            conv_weight,
            conv_bias,
            dt_bias.float(),
            a,
            d.float(),
            chunk_size,
            seq_idx=_kernel_ids(seq_idx),
            activation="silu",
            rmsnorm_weight=norm_weight,
            rmsnorm_eps=eps,
            headdim=head_dim,
            ngroups=num_groups,
            norm_before_gate=False,
        )
        return out.squeeze(0)
    heads, inner = len(a), len(norm_weight)
    gate, mixed, dt = projected.split([inner, len(conv_bias), heads], dim=-1)
    mixed = causal_conv(mixed, conv_weight, conv_bias, seq_idx)
    state_columns = (mixed.shape[1] - inner) // 2
    x, b, c = mixed.split([inner, state_columns, state_columns], dim=-1)
    y, _ = chunk_scan(
        x.unflatten(-1, (heads, head_dim)),
        dt,
        a,
        b.unflatten(-1, (num_groups, -1)),
        c.unflatten(-1, (num_groups, -1)),
        d=d,
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        chunk_size=chunk_size,
    )
    return gated_rms_norm(y.flatten(1), gate, norm_weight, group_size=inner // num_groups, eps=eps)


def phases(tensor: Tensor) -> ModuleType:
    """`phases`, or `cuda` with the same names, for scans that hand states on."""
    if _has_kernels(tensor):
        from nemovl_train.model.kernels import cuda

        return cuda
    from nemovl_train.model.kernels import phases as plain

    return plain


def has_kernels(device: torch.device) -> bool:
    """Whether a device's layers run on mamba-ssm's and causal-conv1d's kernels."""
    return device.type == "cuda" and _installed()


def _has_kernels(tensor: Tensor) -> bool:
    return has_kernels(tensor.device)


@functools.cache
def _installed() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("mamba_ssm", "causal_conv1d"))


def _kernel_ids(seq_idx: Tensor) -> Tensor:
    """The kernels are compiled for contiguous int32 document numbers."""
    return seq_idx.to(torch.int32).contiguous()
