"""The learning rate schedule."""

import pytest

from nemovl_train.config.schema import OptimConfig
from nemovl_train.training.lr import learning_rate

OPTIM = OptimConfig(lr=1.0, min_lr=0.1, warmup_fraction=0.1)


def test_it_warms_up_linearly_and_falls_along_half_a_cosine():
    rates = [learning_rate(OPTIM, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.101
    assert learning_rate(OPTIM, 100, 100) == pytest.approx(0.1)


def test_the_next_to_last_warm_up_step_is_below_the_peak_and_the_last_is_at_it():
    assert [learning_rate(OPTIM, step, 20) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs_stay_between_zero_and_the_peak(total):
    rates = [learning_rate(OPTIM, step, total) for step in range(total)]
    assert rates[0] == 1.0  # a tenth of so few steps is none
    assert all(0.1 <= rate <= 1.0 for rate in rates)


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert learning_rate(OptimConfig(lr=2.0, warmup_fraction=0.0), 0, 10) == 2.0


def test_a_run_that_only_warms_up_ends_at_the_peak():
    optim = OptimConfig(lr=2.0, warmup_fraction=1.0)
    assert [learning_rate(optim, step, 4) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
