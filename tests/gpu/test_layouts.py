"""The layout matrix of `tests/parallel` on as many GPUs as there are: fp32 against one GPU, and `te` in bf16.

In bf16 a layout may err, against fp32 on one GPU, at most 1.5 times what `te` on one GPU errs: sums in another order
round differently, a wrong one would be off by far more. Tensors of a few elements, the mixer's `D` of eight heads say,
have too few roundings for the two errors to be alike: 6 (the ratio of the norms of two such draws exceeds 1.5 one time
in seven, 6 twice in a hundred thousand).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.parallel.layout import Layout

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import matrix

pytestmark = pytest.mark.gpu

RANKS = int(os.environ.get("NEMOVL_TEST_RANKS", torch.cuda.device_count()))
"""More than there are GPUs needs an NCCL that lets ranks share one: `shared_gpus.py`."""
CASES = matrix.EIGHT if RANKS == 8 else matrix.CASES
NAMES = [name for name, case in CASES.items() if RANKS > 1 and matrix.fits(case, RANKS)]
# In bf16 the last bits of a feature, which differ between layouts, decide which of two alike tokens of a video is kept.
SMOOTH = [name for name in NAMES if CASES[name].packs != "clips"]
# Weights that nobody waits for are a race, which NCCL on these small ones may win: gloo's ranks show it.
CONTROLS = [
    name
    for name, case in matrix.CONTROLS.items()
    if RANKS > 1 and matrix.fits(case, RANKS) and case.broken != "collection of weights"
]
FP32 = 1e-4
SLACK = 1.5
FEW, SLACK_OF_FEW = 64, 6.0
TIMEOUT_S = 400


@pytest.fixture(scope="module")
def alone():
    known, layout = {}, Layout.create(ParallelConfig())

    def compute(case, backend, dtype):
        key = (case.alone(), backend)
        if key not in known:
            known[key] = matrix.run_in(layout, case.alone(), backend, dtype)
        return known[key]

    yield compute
    layout.destroy()


def asked(request, fixture):
    """Names of the cases that the chosen tests want of a fixture."""
    return [item.callspec.params["name"] for item in request.session.items if fixture in item.fixturenames]


@pytest.fixture(scope="module")
def fp32(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp32")
    matrix.run_ranks(RANKS, folder, asked(request, "fp32"), timeout_s=TIMEOUT_S)
    return folder


@pytest.fixture(scope="module")
def te(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("te")
    matrix.run_ranks(RANKS, folder, asked(request, "te"), "--backend", "te", "--dtype", "bfloat16", timeout_s=TIMEOUT_S)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_equals_one_gpu_in_fp32(name, fp32, alone, record):
    error, where = matrix.worst(matrix.results(fp32, name), alone(CASES[name], "torch", torch.float32))
    record(f"{RANKS} ranks, fp32, {name}: {where}", error, FP32)
    assert error <= FP32, where


@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_layout_does_not(name, fp32, alone, record):
    error, _ = matrix.worst(matrix.results(fp32, name), alone(matrix.CONTROLS[name], "torch", torch.float32))
    record(f"{RANKS} ranks, fp32, switched off: {name}", error, float("inf"))
    assert error > 1e-3


@pytest.mark.parametrize("name", SMOOTH)
def test_te_errs_as_on_one_gpu(name, te, alone, record):
    exact = alone(CASES[name], "torch", torch.float32)
    one, found = alone(CASES[name], "te", torch.bfloat16), matrix.results(te, name)
    assert found.keys() == exact.keys()
    worst, where = 0.0, ""
    for key in exact:
        alone_error = matrix.worst({key: one[key]}, {key: exact[key]})[0]
        ratio = matrix.worst({key: found[key]}, {key: exact[key]})[0] / max(alone_error, 1e-3)
        share = ratio / (SLACK_OF_FEW if exact[key].numel() < FEW else SLACK)
        if share > worst and not key.endswith("linear_qkv.bias"):
            worst, where = share, key
    record(f"{RANKS} ranks, te bf16, {name}, error over one GPU's as a share of what it may be: {where}", worst, 1.0)
    assert worst <= 1.0, where
