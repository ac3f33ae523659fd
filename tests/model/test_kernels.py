"""The reference kernels against a token-by-token recurrence in float64, written from the definition.

Shape legend: S tokens, D channels, W taps, G groups, H heads, P head width, N state width.
"""

import pytest
import torch
import torch.nn.functional as F

from nemovl_train.model.kernels import reference

LENGTHS = (7, 33, 61, 1)  # 102 tokens: no chunk size divides a length, boundaries lie inside chunks


def documents(lengths=LENGTHS):
    """[1, S] int32."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


def slow_conv(x, weight, bias, seq_idx):
    rows = []
    for t in range(len(x)):
        total = bias
        for i in range(weight.shape[1]):
            if t - i >= 0 and seq_idx[0, t - i] == seq_idx[0, t]:
                total = total + x[t - i] * weight[:, -1 - i]
        rows.append(F.silu(total))
    return torch.stack(rows)


def slow_scan(x, dt, a, b, c, d, dt_bias, seq_idx, initial_state=None):
    heads, groups = x.shape[1], b.shape[1]
    state = x.new_zeros(heads, x.shape[2], b.shape[2]) if initial_state is None else initial_state
    rows = []
    for t in range(len(x)):
        if t and seq_idx[0, t] != seq_idx[0, t - 1]:
            state = torch.zeros_like(state)
        step = F.softplus(dt[t] + dt_bias)
        bt, ct = (m[t].repeat_interleave(heads // groups, 0) for m in (b, c))
        state = torch.exp(step * a)[:, None, None] * state + step[:, None, None] * x[t][:, :, None] * bt[:, None, :]
        rows.append((state * ct[:, None, :]).sum(-1) + d[:, None] * x[t])
    return torch.stack(rows), state


def slow_norm(y, gate, weight, group_size, eps):
    y = y * gate * torch.sigmoid(gate)
    groups = y.view(len(y), -1, group_size)
    return (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).view(y.shape) * weight


def scan_inputs(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    length, heads, width, groups, state = sum(LENGTHS), 6, 5, 2, 3

    def draw(*shape, scale=1.0):
        return torch.randn(shape, generator=g, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()

    return {
        "x": draw(length, heads, width),
        "dt": draw(length, heads, scale=0.5),
        "a": (-torch.rand(heads, generator=g, dtype=torch.float64) * 8 - 0.5).to(dtype).requires_grad_(),
        "b": draw(length, groups, state),
        "c": draw(length, groups, state),
        "d": draw(heads),
        "dt_bias": draw(heads),
    }


def run_scan(inputs, seq_idx, chunk_size, initial_state=None):
    x, dt, a, b, c = (inputs[k] for k in ("x", "dt", "a", "b", "c"))
    return reference.chunk_scan(
        x,
        dt,
        a,
        b,
        c,
        d=inputs["d"],
        dt_bias=inputs["dt_bias"],
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        initial_state=initial_state,
    )


def assert_same(outputs, expected, inputs, tolerance):
    """Outputs and the gradients of all inputs under a fixed random direction, norm-wise relative."""
    directions = [
        torch.randn(e.shape, dtype=e.dtype, generator=torch.Generator().manual_seed(i)) for i, e in enumerate(expected)
    ]
    got = torch.autograd.grad(
        [(o * v.to(o.dtype)).sum() for o, v in zip(outputs, directions, strict=True)], inputs, retain_graph=True
    )
    want = torch.autograd.grad([(o * v).sum() for o, v in zip(expected, directions, strict=True)], inputs)
    for have, need in zip([*outputs, *got], [*expected, *want], strict=True):
        assert (have - need).norm() <= tolerance * need.norm()


@pytest.mark.parametrize("chunk_size", [8, 16, 128])
def test_scan_equals_recurrence(chunk_size):
    inputs, ids = scan_inputs(), documents()
    state = torch.randn(6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    expected = slow_scan(**inputs, seq_idx=ids, initial_state=state)
    outputs = run_scan(inputs, ids, chunk_size, initial_state=state)
    assert_same(outputs, expected, [*inputs.values(), state], 1e-12)


def test_scan_in_float32_is_close():
    inputs, ids = scan_inputs(), documents()
    expected, _ = slow_scan(**inputs, seq_idx=ids)
    single = {k: v.detach().float() for k, v in inputs.items()}
    y, _ = run_scan(single, ids, 16)
    assert (y - expected).norm() <= 1e-6 * expected.norm()


def test_scan_that_ignores_boundaries_differs():
    inputs, ids = scan_inputs(), documents()
    expected, _ = slow_scan(**inputs, seq_idx=ids)
    y, _ = run_scan(inputs, torch.zeros_like(ids), 16)
    assert (y - expected).norm() > 1e-2 * expected.norm()


def test_scan_continues_from_a_final_state():
    inputs = scan_inputs()
    ids = torch.zeros_like(documents())
    whole, last = run_scan(inputs, ids, 16)
    cut = 45
    halves = [{k: v if v.dim() == 1 else v[part] for k, v in inputs.items()} for part in (slice(cut), slice(cut, None))]
    first, middle = run_scan(halves[0], ids[:, :cut], 16)
    second, end = run_scan(halves[1], ids[:, cut:], 16, initial_state=middle)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_scan_survives_strong_decay():
    inputs, ids = scan_inputs(dtype=torch.float32), documents()
    inputs["dt_bias"] = torch.full_like(inputs["dt_bias"], 60.0).requires_grad_()
    y, _ = run_scan(inputs, ids, 64)
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(torch.isfinite(t).all() for t in (y, *grads))


@pytest.mark.parametrize("lengths", [LENGTHS, (2,), (1, 1, 1)])
def test_conv_equals_definition(lengths):
    ids = documents(lengths)
    g = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True)
        for s in ((ids.numel(), 10), (10, 4), (10,))
    )
    outputs = [reference.causal_conv(x, weight, bias, ids)]
    assert_same(outputs, [slow_conv(x, weight, bias, ids)], [x, weight, bias], 1e-12)


def test_conv_that_ignores_boundaries_differs():
    ids = documents()
    x, weight, bias = torch.randn(ids.numel(), 10), torch.randn(10, 4), torch.randn(10)
    expected = slow_conv(x, weight, bias, ids)
    assert (reference.causal_conv(x, weight, bias, torch.zeros_like(ids)) - expected).norm() > 1e-2 * expected.norm()


def test_gated_norm_equals_definition():
    g = torch.Generator().manual_seed(2)
    y, gate, weight = (
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((9, 12), (9, 12), (12,))
    )
    outputs = [reference.gated_rms_norm(y, gate, weight, group_size=4, eps=1e-5)]
    assert_same(outputs, [slow_norm(y, gate, weight, 4, 1e-5)], [y, gate, weight], 1e-12)
