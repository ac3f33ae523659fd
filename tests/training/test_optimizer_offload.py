"""Optimizer state in host memory: the same run, bit for bit, and no state on the device while packs run."""

from dataclasses import replace

import pytest
import running
import tiny_runs
import torch
from test_optimizer import all_equal, moments, steps_of
from tiny_runs import MODEL

from nemovl_train.config.schema import OptimConfig
from nemovl_train.exit_codes import ExitCode
from nemovl_train.model.vlm import build_model
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.step import train_step


def make(layout, *, offload, distributed=True):
    """bfloat16 weights, so that master weights are the optimizer's own."""
    model = build_model(MODEL, layout, params_dtype=torch.bfloat16, backend="torch", seed=5)
    model.freeze(train=("vision", "projector", "language"))
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, offload=offload, distributed=distributed)
    return model, Optimizers(model, layout, optim, torch.bfloat16)


def bytes_of(optimizers):
    """Memory that only the optimizers hold, now."""
    weights = {p.untyped_storage().data_ptr() for p in optimizers.model.parameters()}
    held = {}
    for side in optimizers.sides:
        for inner in getattr(side.optimizer, "chained_optimizers", [side.optimizer]):
            tensors = [p for group in inner.optimizer.param_groups for p in group["params"]]
            tensors += [v for state in inner.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if tensor.numel() > 1 and storage.data_ptr() not in weights:
                    held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def test_a_run_with_it_equals_one_without_also_through_a_checkpoint(data, tmp_path):
    """Before the others: a run makes its own layout, and theirs stays until the end of the file."""
    whole = running.run(tiny_runs.run_config(data, tmp_path / "whole", steps=4))
    config = tiny_runs.run_config(data, tmp_path / "resting", steps=4)
    config = replace(config, optim=replace(config.optim, offload=True))
    assert running.run(config, running.stop_at(3)).code == ExitCode.REQUEUE
    again = running.run(config)
    assert again.code == ExitCode.OK
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[name], whole.tensors[name]) for name in whole.tensors)


@pytest.mark.parametrize("distributed", [True, False])
def test_steps_are_the_same_and_nothing_is_held_in_between(layout, data, distributed):
    (_, plain), (_, resting) = (make(layout, offload=o, distributed=distributed) for o in (False, True))
    trained = sum(p.numel() for p in resting.model.parameters())
    for number, packs in enumerate(steps_of(data, 3)):
        held = []
        between = lambda held=held: held.append(bytes_of(resting))  # noqa: E731
        results = [train_step(plain, packs, layout, lr=1e-2, divisor="global")]
        results.append(train_step(resting, packs, layout, lr=1e-2, divisor="global", between=between))
        assert held == [0], "two packs, and nothing on the device between them"
        assert results[0].loss == results[1].loss
        assert results[0].grad_norm == results[1].grad_norm
        # float32 masters and two moments, but for the weights that are float32 themselves.
        assert bytes_of(resting) == pytest.approx(12 * trained, rel=0.02), number
    with resting.whole_model():
        assert bytes_of(resting) == 0, "evaluation has the room that packs have"
    assert all_equal(moments(plain), moments(resting))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), resting.model.parameters(), strict=True))


def test_what_rests_is_what_comes_back(layout, data):
    """Negative control: other values in host memory make another step."""
    (_, plain), (_, resting) = (make(layout, offload=o) for o in (False, True))
    first, second = steps_of(data, 2)
    for optimizers in (plain, resting):
        train_step(optimizers, first, layout, lr=1e-2, divisor="global")
    assert resting.resting is not None
    resting.resting.rest()
    assert resting.resting.asleep
    for _, host in resting.resting._resting:
        host.zero_()
    for optimizers in (plain, resting):
        train_step(optimizers, second, layout, lr=1e-2, divisor="global")
    assert not all_equal(moments(plain), moments(resting))
