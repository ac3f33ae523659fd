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
    one_configuration_per_kernel()


@pytest.fixture(scope="session")
def record(request):
    """Prints measured differences as they come: a run that is cut off has shown what it found."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def row(name: str, measured: float, bound: float) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{name:<76} {measured:10.2e}  <= {bound:.1e}", end="", flush=True)

    return row
