"""Stop signals in every phase: agreed by all ranks, saved, and continued as if nothing had happened."""

from dataclasses import replace

import pytest
import running
import tiny_runs
from ends import final, last_good_step
from injector import Fault

from nemovl_train.config.schema import RunConfig
from nemovl_train.exit_codes import ExitCode
from nemovl_train.training.folder import StageFolder

REQUEUE = int(ExitCode.REQUEUE)
STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("clean")


def config_of(data, root, **trainer) -> RunConfig:
    """Four packs a step, so that each of two ranks has a second micro-batch to stop before."""
    config = tiny_runs.run_config(data, root, steps=STEPS, **{"global_batch": 4, **trainer})
    return tiny_runs.with_evaluation(config, data)


@pytest.fixture
def clean(data, root, run):
    """A run of two ranks that nothing happened to; made once."""
    config = config_of(data, root)
    if not StageFolder.of(config).is_done():
        assert run(config, ranks=2).codes == [0, 0]
    return final(config)


@pytest.mark.parametrize(
    ("fault", "saved"),
    [
        (Fault("init", "term", rank=1), None),
        pytest.param(Fault("data", "usr1", rank=1, step=1), 1, marks=pytest.mark.slow),
        (Fault("micro_batch", "term", rank=0, step=1), 1),
        pytest.param(Fault("accounted", "int", rank=1, step=3), 3, marks=pytest.mark.slow),
        pytest.param(Fault("save", "usr1", rank=0, step=2), 2, marks=pytest.mark.slow),
        (Fault("write", "term", rank=1, step=2), 2),
        (Fault("eval", "usr1", rank=1, step=STEPS), STEPS),
    ],
    ids=lambda value: getattr(value, "point", None),
)
def test_a_signal_to_one_rank_stops_both_with_everything_saved(data, tmp_path, run, clean, fault, saved):
    config = config_of(data, tmp_path)
    ended = run(config, ranks=2, fault=fault)
    assert ended.codes == [REQUEUE, REQUEUE], ended.texts
    assert last_good_step(config) == saved
    assert not list(StageFolder.of(config).checkpoints.glob(".writing_*"))
    assert run(config, ranks=2).codes == [0, 0]
    assert final(config) == clean


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_sigterm_of_any_rank_after_any_step(data, tmp_path, run, clean, rank, step):
    config = config_of(data, tmp_path)
    ended = run(config, ranks=2, fault=Fault("accounted", "term", rank=rank, step=step))
    assert ended.codes == [REQUEUE, REQUEUE], ended.texts
    assert last_good_step(config) == step
    assert run(config, ranks=2).codes == [0, 0]
    assert final(config) == clean


def test_the_step_in_progress_is_dropped_before_its_weights_move(data, tmp_path, run):
    """Sixteen micro-batches a step: the signal in the first of them does not wait for the other fifteen."""
    config = config_of(data, tmp_path, global_batch=16)
    ended = run(config, fault=Fault("micro_batch", "term", step=2))
    assert ended.codes == [REQUEUE], ended.texts
    assert [row["step"] for row in running.rows(config)] == [1, 2]
    assert last_good_step(config) == 2


@pytest.mark.slow
def test_data_workers_do_not_mind_the_signal(data, tmp_path, run):
    """A scheduler signals the whole process group; workers that died of it would take the save with them."""
    config = config_of(data, tmp_path)
    config = replace(config, data=replace(config.data, num_workers=2))
    ended = run(config, fault=Fault("accounted", "group", step=2), timeout_s=120)
    assert ended.codes == [REQUEUE], ended.texts
    assert last_good_step(config) == 2
    assert run(config, timeout_s=120).codes == [0]


def test_a_run_stops_itself_before_its_time_is_over(data, tmp_path, run):
    config = config_of(data, tmp_path, time_limit_s=5.0)
    ended = run(config)
    assert ended.codes == [REQUEUE], ended.texts
    assert "s are left: saving now" in ended.texts[0]


def test_a_touched_file_asks_for_a_checkpoint(data, tmp_path):
    config = config_of(data, tmp_path)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=100, keep_last=5))
    wish = StageFolder.of(config).path / "save_now"

    def prepare(trainer):
        account = trainer._account

        def accounted(*args):
            account(*args)
            if trainer.state.step == 3:
                wish.touch()

        trainer._account = accounted

    running.run(config, prepare)
    assert [event["folder"] for event in running.events(config, "checkpoint")] == ["step_00000003", "step_00000004"]
    assert not wish.exists()


def test_a_save_that_is_too_slow_for_the_schedulers_grace_is_told(data, tmp_path, run):
    config = config_of(data, tmp_path)
    ended = run(replace(config, checkpoint=replace(config.checkpoint, grace_s=0.001)))
    assert ended.codes == [0]
    assert "too long for the 0 s between the scheduler's signal and the kill" in ended.texts[0]
