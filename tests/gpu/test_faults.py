"""Faults on two GPUs over NCCL, under torchrun as `nemovl launch` starts it, with `te` in bf16.

All runs start at once and share the GPUs: most of their time is imports. Kernels run in their deterministic modes, so
two clean runs should be equal bit by bit, and then a run that was killed or stopped has to be equal to them as well.
Where the two differ all the same, a continued run may differ twice as much. `FAULTS_ON_CPU=1` tries the file itself, on
gloo ranks.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import tiny_runs
import torch

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, *(ROOT / "tests" / name for name in ("faults", "training", "gpu"))]
sys.path += [str(folder) for folder in FOLDERS[1:3]]

from ends import final, last_good_step  # noqa: E402
from running import events, rows  # noqa: E402

from launch.node import NodeJob  # noqa: E402
from nemovl_train.config.dump import dump_yaml  # noqa: E402
from nemovl_train.config.schema import PrecisionConfig, RunConfig  # noqa: E402
from nemovl_train.exit_codes import ExitCode  # noqa: E402
from nemovl_train.training.folder import StageFolder  # noqa: E402

ON_CPU = bool(os.environ.get("FAULTS_ON_CPU"))
pytestmark = (
    [] if ON_CPU else [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
)

RANKS = 2
STEPS, EVERY = 12, 2
DRIVER = str(ROOT / "tests/faults/torchrun_driver.py")
TIMEOUT_S = float(os.environ.get("FAULTS_TIMEOUT_S", "140"))
PACE = {"FAULTS_PACE_S": "0.5"}
DETERMINISTIC = {
    "MAMBA_DETERMINISTIC": "1",
    "CAUSAL_CONV1D_DETERMINISTIC": "1",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
MODEL = replace(
    tiny_runs.MODEL,
    name="mini_gpu",
    # Widths that Transformer Engine's attention and Mamba's kernels take.
    language=replace(
        tiny_runs.MODEL.language,
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        ffn_hidden_size=512,
        mamba_num_heads=8,
        mamba_head_dim=64,
        mamba_state_dim=128,
        chunk_size=128,
    ),
    vision=replace(tiny_runs.MODEL.vision, hidden_size=160, ffn_hidden_size=320),
)


@dataclass
class Job:
    """A run that was started.

    Attributes:
        code: Exit code of the launcher, once it ended.
        saved: Step of the newest good checkpoint when it ended.
        steps: Steps that its log had then.
        files: What that checkpoint consisted of, and what was half written beside it.
    """

    name: str
    config: RunConfig
    process: subprocess.Popen
    log: Path
    code: int | None = None
    saved: int | None = None
    steps: int = 0
    files: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def metrics(self) -> Path:
        return StageFolder.of(self.config).path / "metrics.jsonl"

    def note_end(self) -> None:
        self.code = self.process.wait()
        self.saved = last_good_step(self.config)
        self.steps = len(rows(self.config)) if self.metrics.is_file() else 0
        checkpoints = StageFolder.of(self.config).checkpoints
        found = [*checkpoints.glob(f"step_{self.saved or 0:08d}/sharded/*"), *checkpoints.glob(".writing_*")]
        self.files = tuple(sorted(path.name for path in found))


class Jobs:
    """Starts runs that only their folder and their fault tell apart."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.monotonic()
        self.data = tiny_runs.write_data(folder / "data")
        self.running: list[Job] = []

    def config(self, name: str, **trainer: object) -> RunConfig:
        config = tiny_runs.run_config(self.data, self.folder / name, steps=STEPS, global_batch=4, **trainer)
        return replace(
            config,
            model=MODEL,
            data=replace(config.data, seq_length=256, max_seqlen_bucket=128),
            precision=PrecisionConfig(params="bf16", backend="auto"),
            checkpoint=replace(config.checkpoint, every_steps=EVERY),
        )

    def start(
        self,
        name: str,
        *fault: object,
        restarts: int = 0,
        node: bool = True,
        env: dict[str, str] | None = None,
        config: RunConfig | None = None,
    ) -> Job:
        config = config or self.config(name)
        path = self.folder / f"{name}.yaml"
        path.write_text(dump_yaml(config))
        program = [DRIVER, str(path), *map(str, fault)]
        node_options = ["--nproc", str(RANKS), "--max-restarts", str(restarts)]
        command = [sys.executable, "-m", "launch.node", *node_options, "--", *program]
        if not node:
            command = NodeJob(nproc=RANKS, max_restarts=restarts).command(program)
        paths = os.pathsep.join([*map(str, FOLDERS), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **DETERMINISTIC, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(env or {})}
        log = self.folder / f"{name}.log"
        with log.open("a") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        job = Job(name, config, process, log)
        self.running.append(job)
        return job

    def until(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if time.monotonic() - self.began > TIMEOUT_S:
                texts = "".join(f"\n--- {job.name}\n{job.text[-2000:]}" for job in self.running)
                raise AssertionError(f"not in {TIMEOUT_S:.0f} s: {what}{texts}")
            time.sleep(0.05)

    def end(self, job: Job) -> Job:
        self.until(lambda: job.process.poll() is not None, f"the end of {job.name}")
        job.note_end()
        print(f"{time.monotonic() - self.began:4.0f} s  {job.name}: {job.code}, saved {job.saved}", flush=True)
        return job

    def close(self) -> None:
        for job in self.running:
            if job.process.poll() is None:
                for child in (*psutil.Process(job.process.pid).children(recursive=True), job.process):
                    child.kill()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Iterator[dict[str, Job]]:
    """Every run, ended; the one that was asked to stop is in `asked` as it was left, in `continued` at its end."""
    started = Jobs(tmp_path_factory.mktemp("faults"))
    try:
        found = {
            "asked": started.start("asked", env=PACE),
            "direct": started.start("direct", node=False, env=PACE),
            "killed": started.start("killed", "step", "kill", 1, 7, restarts=1),
            "clean": started.start("clean"),
            "again": started.start("again"),
            "flipped": started.start(
                "flipped", "step", "flip", 1, 2, config=started.config("flipped", check_replicas_every=1)
            ),
        }
        for name in ("asked", "direct"):
            job = found[name]
            started.until(lambda job=job: _lines(job) >= 3 or job.process.poll() is not None, f"three steps of {name}")
            job.process.send_signal(signal.SIGUSR1)
        started.end(found["asked"])
        found["continued"] = started.start("continued", config=found["asked"].config)
        for job in list(started.running):
            if job.code is None:
                started.end(job)
        yield found
    finally:
        started.close()


def _lines(job: Job) -> int:
    return len(job.metrics.read_text().splitlines()) if job.metrics.is_file() else 0


def losses(job: Job) -> list[float]:
    found = rows(job.config)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert all(row["applied"] for row in found)
    return [row["loss"] for row in found]


def distance(job: Job, other: Job) -> float:
    """Largest relative difference of two runs' losses, which had the same packs."""
    for mine, theirs in zip(rows(job.config), rows(other.config), strict=True):
        for key in ("packs_consumed", "tokens", "supervised_tokens", "visual_tokens", "samples", "tokens_seen"):
            assert mine[key] == theirs[key], (key, mine["step"])
    return max(abs(a - b) / abs(b) for a, b in zip(losses(job), losses(other), strict=True))


@pytest.fixture(scope="module")
def spread(jobs, record) -> float:
    """How far two clean runs are apart: the bound of determinism."""
    for name in ("clean", "again"):
        assert jobs[name].code == 0, jobs[name].text
    found = distance(jobs["again"], jobs["clean"])
    same = final(jobs["again"].config)["tensors"] == final(jobs["clean"].config)["tensors"]
    record(f"two clean runs, losses (weights and moments bitwise equal: {same})", found, 1e-2)
    first = losses(jobs["clean"])[0]
    assert (
        max(abs(loss - first) for loss in losses(jobs["clean"])) > 0.1
    )  # something is learnt: equality says something
    assert found < 1e-2
    return found


def assert_as_clean(job: Job, jobs: dict[str, Job], spread: float, record) -> None:
    assert job.code == 0, job.text
    away = distance(job, jobs["clean"])
    record(f"{job.name}: losses against the clean run", away, 2 * spread)
    assert away <= 2 * spread
    if final(jobs["again"].config)["tensors"] == final(jobs["clean"].config)["tensors"]:
        assert final(job.config)["tensors"] == final(jobs["clean"].config)["tensors"]


def test_a_killed_rank_is_restarted_and_the_run_ends_as_the_clean_one(jobs, spread, record):
    job = jobs["killed"]
    assert_as_clean(job, jobs, spread, record)
    starts = [event["resumed_from_step"] for event in events(job.config, "start")]
    assert starts in ([0, 4], [0, 6])


def test_usr1_saves_on_every_rank_and_asks_to_be_started_again(jobs, spread, record):
    job = jobs["asked"]
    assert job.code == ExitCode.REQUEUE, job.text
    assert 3 <= job.steps < STEPS
    assert_saved_by_every_rank(job)
    assert_as_clean(jobs["continued"], jobs, spread, record)


def test_usr1_to_torchrun_itself_saves_on_every_rank(jobs):
    job = jobs["direct"]
    assert 3 <= job.steps < STEPS
    assert_saved_by_every_rank(job)
    assert "run again to continue" in job.text


def assert_saved_by_every_rank(job: Job) -> None:
    assert job.saved == job.steps, job.text
    assert job.files == ("index.json", *(f"rank_{rank:05d}.bin" for rank in range(RANKS)))


def test_a_flipped_bit_on_one_gpu_is_found(jobs):
    job = jobs["flipped"]
    assert job.code == ExitCode.FAILED, job.text
    assert job.steps == 2
    assert "weights that must be equal differ: " in job.text
    assert "on ranks [0, 1] (no majority)" in job.text
