"""Every parallel layout gives what one process gives: loss, gradient norm, logits and each whole gradient, in fp32.

The cheapest case of each mechanism runs always, the whole matrix among the slow tests. Mechanisms are also switched off
one by one, to show that the comparison would see it.
"""

from dataclasses import replace

import matrix
import pytest
import torch
from matrix_packs import MODEL, alone_pack, make_packs

from nemovl_train.checkpoint import sealed
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.model.adapters import TrainedWeights
from nemovl_train.model.batch import PackBatch
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.step import train_step

RANKS = 4
BOUND = 1e-5
LOSS_BOUND = 5e-6
# Steps are some 1e-4 of a parameter, whose own rounding is 6e-8.
MOVE_BOUND = 1e-3


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_process():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.fixture(scope="module")
def alone(one_process):
    """What a case gives without other processes, computed once."""
    known = {}

    def compute(case, **changed):
        key = replace(case.alone(), **changed)
        if key not in known:
            known[key] = matrix.run_in(one_process, key)
        return known[key]

    return compute


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    matrix.run_ranks(RANKS, folder, [*matrix.QUICK, *matrix.QUICK_CONTROLS], "--checkpoint", timeout_s=300)
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    matrix.run_ranks(RANKS, folder, [*matrix.CASES, *matrix.CONTROLS], timeout_s=900)
    return folder


def check(folder, name, alone, cases=matrix.CASES):
    case = cases[name]
    expected, found = alone(case), matrix.results(folder, name)
    error, where = matrix.worst(found, expected)
    assert error <= BOUND, where
    error, where = matrix.worst(found, expected, moves=True)
    assert error <= MOVE_BOUND, where
    losses = [key for key in expected if key.startswith("loss")]
    assert losses
    assert all(abs(found[key] - expected[key]) <= LOSS_BOUND * expected[key] for key in losses)


def check_control(folder, name, alone):
    found, expected = matrix.results(folder, name), alone(matrix.CONTROLS[name])
    error = max(matrix.worst(found, expected, moves=moves)[0] for moves in (False, True))
    assert error > 10 * MOVE_BOUND, "the mechanism makes no difference: the comparison shows nothing"


@pytest.mark.parametrize("name", matrix.QUICK)
def test_a_layout_equals_one_process(name, quick, alone):
    check(quick, name, alone)


@pytest.mark.parametrize("name", matrix.QUICK_CONTROLS)
def test_a_broken_layout_does_not(name, quick, alone):
    check_control(quick, name, alone)


def is_plain(case):
    """Whether its logits are those of the hybrid model as it begins."""
    return not case.steps and case.model == "hybrid" and not case.adapter.rank and case.packs != "clips"


@pytest.mark.parametrize("name", [name for name in matrix.QUICK if is_plain(matrix.CASES[name])])
def test_a_document_in_a_pack_is_as_alone(name, quick, documents_alone):
    """Every layout's packed logits against each document in a pack of its own, in one process."""
    found = matrix.results(quick, name)
    assert found["rows moved in other documents"] == 0
    pack = make_packs("images")[0]
    assert matrix.CASES[name].packs in ("images", "first")  # both have images in this pack
    for number, expected in enumerate(documents_alone):
        begin, end = pack.cu_seqlens[number : number + 2].tolist()
        difference = found["logits"][begin:end] - expected
        assert difference.norm() <= BOUND * expected.norm(), number


@pytest.fixture(scope="module")
def documents_alone(one_process):
    model, _, _ = matrix.make_trainer(matrix.Case(), MODEL, one_process)
    pack = make_packs("images")[0]
    logits = []
    with torch.no_grad():
        for number, _ in enumerate(pack.sample_keys):
            alone = alone_pack(pack, number)
            length = int(alone.cu_seqlens[1])
            logits.append(model.logits(PackBatch.from_pack(alone, one_process))[:length])
    return logits


@pytest.fixture(scope="module")
def moved(quick, one_process):
    return moved_state(quick, one_process)


def moved_state(folder, one_process):
    """Parameters and optimizer state of both checkpoints, loaded in one process, and of a run that never moved."""
    found = {}
    for name in ("first", "second", None):
        model, optimizers, optim = matrix.make_trainer(matrix.MOVED, MODEL, one_process)
        if name is None:
            for _ in range(matrix.MOVED.steps):
                train_step(optimizers, make_packs("images"), one_process, lr=optim.lr, divisor="global")
        else:
            step = sealed.step_folder(folder / name, matrix.MOVED.steps)
            sealed.load(step, model=model, optimizer=optimizers)
        tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
        for side in optimizers.sides:
            for number, tensor in enumerate(_state_tensors(side.optimizer)):
                tensors[f"{side.name} state {number}"] = tensor.clone()
        found[name] = tensors
    return found


def _state_tensors(optimizer):
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.detach()
                for key in ("exp_avg", "exp_avg_sq"):
                    yield inner.optimizer.state[parameter][key]


def test_a_checkpoint_moves_between_layouts_bitwise(quick, moved):
    """Written at TP 2 x CP 2; loaded in one process, and at TP 2 x DP 2, written there and loaded in one process."""
    check_moved_bitwise(quick, moved)


def test_a_moved_checkpoint_is_the_state_of_a_run_that_never_moved(quick, moved):
    check_moved_state(quick, moved)


def check_moved_bitwise(folder, moved):
    assert moved["first"].keys() == moved["second"].keys()
    different = [n for n, t in moved["first"].items() if not torch.equal(t, moved["second"][n])]
    assert different == []
    gathered = matrix.results(folder, "moved")
    for name, tensor in moved["first"].items():
        if f"first {name}" in gathered:
            assert torch.equal(tensor, gathered[f"first {name}"]), name
            assert torch.equal(tensor, gathered[f"second {name}"]), name
    assert any(" state " in name and t.any() for name, t in moved["first"].items())


def check_moved_state(folder, moved):
    """Moments are in their own parameters' places: those of one process after the same steps, up to rounding."""
    for name, tensor in moved[None].items():
        assert (moved["first"][name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-9, name
    gathered = matrix.results(folder, "moved")
    first, second = (gathered[f"{name}, loss of the next step"] for name in ("first", "second"))
    assert abs(first - second) <= LOSS_BOUND * first


def test_adapters_move_between_layouts_bitwise(quick, one_process):
    """Written at TP 2 x CP 2 without their base, loaded in one process; the step after is the one taken there."""
    model, optimizers, optim = matrix.make_trainer(matrix.ADAPTED, MODEL, one_process)
    saved, gathered = TrainedWeights(model), matrix.results(quick, "adapters")
    folder = sealed.step_folder(quick / "adapters", matrix.ADAPTED.steps)
    sealed.load(folder, model=saved, optimizer=optimizers)
    assert set(saved.names) == gathered.keys() - {"loss"}
    parameters = dict(model.named_parameters())
    assert [name for name in saved.names if not torch.equal(parameters[name].detach(), gathered[name])] == []
    packs = make_packs("images")
    loss = train_step(optimizers, packs, one_process, lr=optim.lr, divisor="global").loss
    assert abs(loss - gathered["loss"]) <= LOSS_BOUND * loss


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in matrix.CASES if name not in matrix.QUICK])
def test_every_layout_equals_one_process(name, everything, alone):
    check(everything, name, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in matrix.CONTROLS if name not in matrix.QUICK_CONTROLS])
def test_no_broken_layout_does(name, everything, alone):
    check_control(everything, name, alone)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    matrix.run_ranks(8, folder, matrix.EIGHT, "--checkpoint", timeout_s=900)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", matrix.EIGHT)
def test_every_layout_of_eight_ranks_equals_one_process(name, eight, alone):
    check(eight, name, alone, matrix.EIGHT)


@pytest.mark.slow
def test_a_checkpoint_of_eight_ranks_moves_bitwise(eight, one_process):
    """Written at TP 2 x CP 4; loaded in one process, and at TP 2 x DP 4, written there and loaded in one process."""
    moved = moved_state(eight, one_process)
    check_moved_bitwise(eight, moved)
    check_moved_state(eight, moved)


def test_micro_batches_and_order_do_not_matter_to_one_process(alone):
    """The reference itself: another order of packs is another order of sums and nothing else."""
    turned = alone(matrix.Case(), order=(2, 0, 3, 1))
    assert matrix.worst(turned, alone(matrix.Case()))[0] <= BOUND
