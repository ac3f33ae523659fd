"""A run that was stopped or killed anywhere and started again equals one that was not, bitwise."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import running
import tiny_runs

from nemovl_train.config.dump import dump_yaml
from nemovl_train.evaluation import run as evaluation
from nemovl_train.exceptions import CheckpointError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.training import trainer
from nemovl_train.training.folder import StageFolder

STEPS = 6
ROOT = Path(__file__).parents[2]
DRIVER = """
import sys
from pathlib import Path
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.training import trainer
sys.exit(trainer.run(load_yaml(RunConfig, Path(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run from beginning to end."""
    config = tiny_runs.run_config(data, tmp_path_factory.mktemp("whole"))
    outcome = running.run(config)
    assert outcome.code == ExitCode.OK
    assert len(running.rows(config)) == STEPS
    return config, outcome


@pytest.fixture
def config(data, tmp_path):
    return tiny_runs.run_config(data, tmp_path)


def at_once(config):
    """Checkpoints are there when the next step begins, so that a test knows which there are."""
    return replace(config, checkpoint=replace(config.checkpoint, in_background=False))


@pytest.mark.parametrize("step", range(1, STEPS))
def test_stopped_by_sigterm_at_any_step(whole, config, step):
    first = running.run(config, running.stop_at(step))
    assert first.code == ExitCode.REQUEUE
    assert first.state["step"] == step
    assert (StageFolder.of(config).checkpoints / f"step_{step:08d}" / "COMPLETE").is_file()
    second = running.run(config)
    assert second.code == ExitCode.OK
    assert min(second.digests) == step
    second.digests |= first.digests
    running.assert_same_end(config, second, *whole)
    assert second.digests == whole[1].digests
    assert [event["resumed_from_step"] for event in running.events(config, "start")] == [0, step]


def test_a_signal_in_the_last_step_is_not_lost(config):
    assert running.run(config, running.stop_at(STEPS)).code == ExitCode.REQUEUE
    assert trainer.run(config) == ExitCode.OK
    assert len(running.events(config, "start")) == 1


def test_a_signal_during_evaluation(config, data, monkeypatch):
    config = tiny_runs.with_evaluation(config, data)
    scored, score = [], evaluation.score_pack

    def interrupted(*args, **options):
        scored.append(args)
        os.kill(os.getpid(), signal.SIGUSR1)
        return score(*args, **options)

    monkeypatch.setattr(evaluation, "score_pack", interrupted)
    config = replace(config, evaluation=replace(config.evaluation, seq_length=128))
    assert trainer.run(config) == ExitCode.REQUEUE
    assert len(scored) == 1  # of several packs
    monkeypatch.undo()
    folder = StageFolder.of(config)
    assert not folder.is_done()
    assert trainer.run(config) == ExitCode.OK
    assert folder.is_done()
    assert len(running.rows(config)) == STEPS


def test_every_signal_asks_for_a_save_once(config):
    from nemovl_train.training.signals import STOP_SIGNALS

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    running.run(config, running.stop_at(2))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_lost_between_checkpoints(whole, config):
    """Killed after step 5, whose last checkpoint is of step 4: the rows after it are taken again."""
    config = at_once(config)

    def killed(run):
        account = run._account

        def dies(*args):
            account(*args)
            if run.state.step == 5:
                raise KeyboardInterrupt

        run._account = dies

    with pytest.raises(KeyboardInterrupt):
        running.run(config, killed)
    path = StageFolder.of(config).path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # as a process leaves it that dies while writing
    second = running.run(config)
    assert min(second.digests) == 4
    running.assert_same_end(config, second, *whole)


def test_a_damaged_checkpoint_is_left_for_the_one_before(whole, config, caplog):
    assert running.run(config, running.stop_at(5)).code == ExitCode.REQUEUE
    checkpoints = StageFolder.of(config).checkpoints
    damaged = checkpoints / "step_00000005" / "state.json"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        second = running.run(config)
    assert "checkpoint rejected" in caplog.text
    assert str(damaged) in caplog.text
    assert min(second.digests) == 4
    running.assert_same_end(config, second, *whole)
    assert trainer.run(config) == ExitCode.OK


def test_a_damaged_newest_checkpoint_does_not_stop_retention(whole, config):
    """Damage in step 5 and a restart from step 2: the checkpoint of step 4 is newer than all good ones."""
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=1, keep_last=3))
    assert running.run(config, running.stop_at(5)).code == ExitCode.REQUEUE
    checkpoints = StageFolder.of(config).checkpoints
    for step in (4, 5):
        (checkpoints / f"step_{step:08d}" / "COMPLETE").unlink()
    config = replace(config, checkpoint=replace(config.checkpoint, keep_last=1))
    second = running.run(config)
    assert min(second.digests) == 3
    running.assert_same_end(config, second, *whole)
    assert [path.name for path in sorted(checkpoints.glob("*"))] == ["step_00000006"]


def test_the_dry_batch_leaves_no_trace(whole, config):
    def without_dry_batch(run):
        run._dry_batch = lambda packs: None

    running.assert_same_end(config, running.run(config, without_dry_batch), *whole)


def test_leftovers_of_a_killed_save_are_removed_at_the_start(config):
    checkpoints = StageFolder.of(config).checkpoints
    for name in (".writing_step_00000002", ".discarded_step_00000001"):
        (checkpoints / name / "sharded").mkdir(parents=True)
    running.run(config, running.stop_at(1))
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000001"]


def test_a_checkpoint_of_another_run_is_refused(whole, config):
    checkpoints = StageFolder.of(config).checkpoints
    other = replace(whole[0], run=replace(whole[0].run, name="other", root=config.run.root))
    running.run(other, running.stop_at(1))
    shutil.copytree(StageFolder.of(other).checkpoints, checkpoints)
    with pytest.raises(CheckpointError, match=r"belongs to run 'other/train/.*', not 'mini/train/.*another run.name"):
        trainer.run(config)


def test_a_renamed_checkpoint_is_refused(config):
    running.run(config, running.stop_at(1))
    checkpoints = StageFolder.of(config).checkpoints
    (checkpoints / "step_00000001").rename(checkpoints / "step_00000003")
    with pytest.raises(CheckpointError, match="renamed"):
        trainer.run(config)


def test_changed_data_are_refused(config, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    config = tiny_runs.run_config(copy, tmp_path)
    running.run(config, running.stop_at(1))
    shutil.rmtree(copy / "text")
    shutil.copytree(data / "pictures", copy / "text")
    with pytest.raises(CheckpointError, match="data plan changed"):
        trainer.run(config)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 18])
def test_killed_with_minus_nine_and_started_again(data, tmp_path, rows):
    """Killed somewhere after some rows; where exactly is up to the machine."""
    steps = 25
    expected_config = tiny_runs.run_config(data, tmp_path / "whole", steps=steps)
    expected = running.run(expected_config)
    config = tiny_runs.run_config(data, tmp_path / "killed", steps=steps)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    metrics = StageFolder.of(config).path / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= rows):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    second = running.run(config)
    assert second.code == ExitCode.OK
    running.assert_same_end(config, second, expected_config, expected)
