"""GPU tests: `pytest tests/gpu -m gpu` on a host with CUDA and the packages of the `gpu` extra."""

import importlib
import os
import pkgutil

import pytest
import torch

# Triton multiplies fp32 in TF32 unless it is told otherwise; it reads this when a kernel is first compiled.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


@pytest.fixture(scope="session", autouse=True)
def exact_fp32():
    """fp32 means fp32: no TF32 in matrix products either."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def one_configuration_per_kernel():
    """Mamba's Triton kernels have about 200 configurations to choose from; results do not depend on the choice.

    The one with the smallest tiles and fewest stages fits every dtype's shared memory, and trying no other one saves
    minutes.
    """
    import mamba_ssm.ops.triton as kernels
    from triton.runtime.autotuner import Autotuner

    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = [min(kernel.configs, key=_size)]


def _size(config) -> tuple[int, int]:
    tile = 1
    for name, value in config.kwargs.items():
        tile *= value if name.startswith("BLOCK") else 1
    return tile * max(config.num_stages, 1), config.num_warps


@pytest.fixture(scope="session")
def record(request):
    """Collects measured differences and prints them as one table at the end."""
    rows: list[tuple[str, float, float]] = []
    yield lambda name, measured, bound: rows.append((name, measured, bound))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + "\n".join(f"{name:<76} {measured:10.2e}  <= {bound:.1e}" for name, measured, bound in rows))
