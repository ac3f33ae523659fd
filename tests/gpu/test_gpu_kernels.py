"""mamba-ssm and causal-conv1d against the PyTorch reference, packed, at the 12B model's widths.

Inputs are rounded to the kernel's dtype first, so the reference (fp32) and the kernel see the same numbers and only
the arithmetic differs. bf16 bounds are a few units of bf16 rounding (2^-8) after a norm-wise average.

Shape legend: S tokens in a pack, D channels, G groups, H heads, P head width, N state width.
"""

import pytest
import torch
from gpu_packs import relative

from nemovl_train.model.kernels import dispatch, reference

pytestmark = pytest.mark.gpu

H, P, G, N, TAPS, CHUNK = 128, 80, 8, 128, 4, 128
INNER, CHANNELS = H * P, H * P + 2 * G * N
LENGTHS = (7, 1000, 129, 1, 1413, 512, 33)  # nothing divides the chunk, one document is shorter than the taps
BOUNDS = {torch.float32: (2e-5, 2e-4), torch.bfloat16: (8e-3, 2e-2)}


def pack_ids() -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int().cuda()[None]


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = sum(LENGTHS)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).cuda()

    dt_bias = torch.rand(H, generator=generator).mul(4).sub(5).to(dtype).cuda()
    return {
        "projected": draw(size, 2 * INNER + 2 * G * N + H),
        "conv_weight": draw(CHANNELS, TAPS, scale=0.4),
        "conv_bias": draw(CHANNELS, scale=0.1),
        "a_log": (torch.rand(H, generator=generator) * 15 + 1).log().cuda(),
        "d": (1 + 0.1 * torch.randn(H, generator=generator)).cuda(),
        "dt_bias": dt_bias,
        "norm_weight": (1 + 0.1 * torch.randn(INNER, generator=generator)).to(dtype).cuda(),
    }


def run(values: dict[str, torch.Tensor], grad_S: torch.Tensor, seq_idx: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    out = dispatch.mamba_inner(**leaves, seq_idx=seq_idx, head_dim=P, num_groups=G, chunk_size=CHUNK, eps=1e-5)
    out.backward(grad_S.to(out.dtype))
    return {"output": out, **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_whole_mixer_equals_the_reference(dtype, monkeypatch, record):
    values = inputs(dtype)
    grad_S = torch.randn(sum(LENGTHS), INNER, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    found = run(values, grad_S, pack_ids())
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    expected = run({name: value.float() for name, value in values.items()}, grad_S.float(), pack_ids())
    for name, bound in zip(found, (BOUNDS[dtype][0], *[BOUNDS[dtype][1]] * 7), strict=True):
        error = relative(found[name], expected[name])
        record(f"mixer {dtype} {name}", error, bound)
        assert error <= bound, name


def test_leaking_across_documents_would_be_seen():
    """Negative control: with one document instead of seven the output is another."""
    values = inputs(torch.float32)
    grad_S = torch.zeros(sum(LENGTHS), INNER, device="cuda")
    packed = run(values, grad_S, pack_ids())["output"]
    leaking = run(values, grad_S, torch.zeros_like(pack_ids()))["output"]
    assert relative(packed, leaking) > 1e-2


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_convolution_equals_the_reference(dtype, record):
    x = torch.randn(sum(LENGTHS), CHANNELS, generator=torch.Generator().manual_seed(2)).to(dtype).cuda()
    values = inputs(dtype)
    weight, bias = values["conv_weight"], values["conv_bias"]
    found = dispatch.causal_conv(x, weight, bias, pack_ids())
    error = relative(found, reference.causal_conv(x.float(), weight.float(), bias.float(), pack_ids()))
    record(f"conv {dtype}", error, BOUNDS[dtype][0])
    assert error <= BOUNDS[dtype][0]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_scan_and_its_last_state_equal_the_reference(dtype, record):
    generator = torch.Generator().manual_seed(3)
    size = sum(LENGTHS)
    x, b, c = (torch.randn(size, *s, generator=generator).to(dtype).cuda() for s in ((H, P), (G, N), (G, N)))
    dt = torch.randn(size, H, generator=generator).to(dtype).cuda()
    values = inputs(dtype)
    options = {"d": values["d"], "seq_idx": pack_ids(), "chunk_size": CHUNK}
    a = -values["a_log"].exp()
    found = dispatch.chunk_scan(x, dt, a, b, c, dt_bias=values["dt_bias"].float(), **options)
    wide = (t.float() for t in (x, dt, a, b, c))
    expected = reference.chunk_scan(*wide, dt_bias=values["dt_bias"].float(), **options)
    for name, mine, theirs in zip(("output", "last state"), found, expected, strict=True):
        error = relative(mine, theirs)
        record(f"scan {dtype} {name}", error, BOUNDS[dtype][0])
        assert error <= BOUNDS[dtype][0], name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gated_norm_equals_the_reference(dtype, record):
    generator = torch.Generator().manual_seed(4)
    y, gate = (torch.randn(sum(LENGTHS), INNER, generator=generator).to(dtype).cuda() for _ in range(2))
    weight = inputs(dtype)["norm_weight"]
    options = {"group_size": INNER // G, "eps": 1e-5}
    found = dispatch.gated_rms_norm(y, gate, weight, **options)
    error = relative(found, reference.gated_rms_norm(y.float(), gate.float(), weight.float(), **options))
    record(f"gated norm {dtype}", error, BOUNDS[dtype][0])
    assert error <= BOUNDS[dtype][0]
