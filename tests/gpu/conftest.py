"""GPU tests: `pytest tests/gpu -m gpu` on a host with CUDA and the packages of the `gpu` extra."""

import os

import pytest
import torch
from gpu_packs import one_configuration_per_kernel

# Triton multiplies fp32 in TF32 unless it is told otherwise; it reads this when a kernel is first compiled.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


@pytest.fixture(scope="session", autouse=True)
def exact_fp32():
    """fp32 means fp32: no TF32 in matrix products either."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def quick_kernels():
    """No autotuning: a cold start of Mamba's kernels would take minutes."""
    if torch.cuda.is_available():
        one_configuration_per_kernel()


@pytest.fixture(scope="session")
def record(request):
    """Collects measured differences and prints them as one table at the end."""
    rows: list[tuple[str, float, float]] = []
    yield lambda name, measured, bound: rows.append((name, measured, bound))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + "\n".join(f"{name:<76} {measured:10.2e}  <= {bound:.1e}" for name, measured, bound in rows))
