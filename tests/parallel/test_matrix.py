"""Every parallel layout gives what one process gives: loss, gradient norm, logits and each whole gradient, in fp32.

The cheapest case of each mechanism runs always, the whole matrix among the slow tests. Mechanisms are also switched off
one by one, to show that the comparison would see it.
"""

from dataclasses import replace

import matrix
import pytest
import torch

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.parallel.layout import Layout

RANKS = 4
BOUND = 1e-5
LOSS_BOUND = 5e-6


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def alone():
    """What a case gives without other processes, computed once."""
    known, layout = {}, Layout.create(ParallelConfig())

    def compute(case, **changed):
        key = replace(case.alone(), **changed)
        if key not in known:
            known[key] = matrix.run_in(layout, key)
        return known[key]

    yield compute
    layout.destroy()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    matrix.run_ranks(RANKS, folder, [*matrix.QUICK, *matrix.QUICK_CONTROLS], timeout_s=300)
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    matrix.run_ranks(RANKS, folder, [*matrix.CASES, *matrix.CONTROLS], timeout_s=900)
    return folder


def check(folder, name, alone):
    case = matrix.CASES[name]
    expected, found = alone(case), matrix.results(folder, name)
    error, where = matrix.worst(found, expected)
    assert error <= BOUND, where
    losses = [key for key in expected if key.startswith("loss")]
    assert losses
    assert all(abs(found[key] - expected[key]) <= LOSS_BOUND * expected[key] for key in losses)


def check_control(folder, name, alone):
    error, _ = matrix.worst(matrix.results(folder, name), alone(matrix.CONTROLS[name]))
    assert error > 1e-3, "the mechanism makes no difference: the comparison shows nothing"


@pytest.mark.parametrize("name", matrix.QUICK)
def test_a_layout_equals_one_process(name, quick, alone):
    check(quick, name, alone)


@pytest.mark.parametrize("name", matrix.QUICK_CONTROLS)
def test_a_broken_layout_does_not(name, quick, alone):
    check_control(quick, name, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in matrix.CASES if name not in matrix.QUICK])
def test_every_layout_equals_one_process(name, everything, alone):
    check(everything, name, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in matrix.CONTROLS if name not in matrix.QUICK_CONTROLS])
def test_no_broken_layout_does(name, everything, alone):
    check_control(everything, name, alone)


def test_micro_batches_and_order_do_not_matter_to_one_process(alone):
    """The reference itself: another order of packs is another order of sums and nothing else."""
    turned = alone(matrix.Case(), order=(2, 0, 3, 1))
    assert matrix.worst(turned, alone(matrix.Case()))[0] <= BOUND
