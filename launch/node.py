"""One node's share of a run: torchrun as a child process, with the two things that torchrun does not do.

torchrun (torch 2.11, `torch/distributed/elastic`) turns every exit code of its processes into 1, and a signal that it
passes on leaves them 30 seconds before they are killed, which no step and no save at full size keeps. So signals go
past it: they are handed to the training processes directly, and torchrun waits for these to end by themselves. The
exit code comes back through a file (`NEMOVL_EXIT_FILE`, see `nemovl_train.exit_codes`).

On a cluster the scheduler starts `python -m launch.node ...` once a node; `nemovl launch torchrun` does so here.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from nemovl_train.exit_codes import EXIT_FILE, ExitCode, read_exit_file

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
MOST_STAGGER_SECONDS = 60.0
_NAP_SECONDS = 0.1
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}
"""Folders of compiled kernels by the variable that names them. Every process of every node would otherwise write them
to one home folder, on storage that is slow at small files."""


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """What one node starts.

    Attributes:
        nproc: Processes of this node, one for each GPU.
        nnodes: Nodes of the run.
        rendezvous: `HOST:PORT` of the first node; needed when there are several.
        run_id: Name of the rendezvous, the same on all nodes.
        max_restarts: Times that torchrun starts the processes again when one fails or a node comes back.
    """

    nproc: int
    nnodes: int = 1
    rendezvous: str = ""
    run_id: str = "nemovl"
    max_restarts: int = 0

    def command(self, program: Sequence[str], python: str = sys.executable) -> list[str]:
        """The torchrun command line for `-m MODULE ARGUMENT...`."""
        meeting = ["--standalone", "--nnodes=1"]
        if self.nnodes > 1:
            meeting = [
                f"--nnodes={self.nnodes}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={self.rendezvous}",
                f"--rdzv-id={self.run_id}",
            ]
        return [
            python,
            "-m",
            "torch.distributed.run",
            *meeting,
            f"--nproc-per-node={self.nproc}",
            f"--max-restarts={self.max_restarts}",
            # SIGUSR1 is not in torchrun's default list: sent to it by hand it would end the launcher and leave the
            # processes behind.
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            *program,
        ]


def run_node(
    job: NodeJob,
    program: Sequence[str],
    *,
    caches: Path | None = None,
    report: Path | None = None,
    delay: float = 0.0,
) -> int:
    """Run the processes of this node to their end.

    Args:
        job: What to start.
        program: `-m MODULE ARGUMENT...`.
        caches: Folder on a local disk for compiled kernels; where the environment already names one, that stays.
        report: File on shared storage for the run's exit code. The node of rank 0 writes it, and all nodes end with 0
            where nothing failed: a scheduler may kill the others of a step when one ends with anything else.
        delay: Seconds to wait first. A stop signal ends the wait, and nothing is started.

    Returns:
        The run's own exit code. `ExitCode.REQUEUE` also when a stop was asked for before there was anything to save.
    """
    with tempfile.TemporaryDirectory(prefix="nemovl-node-") as folder:
        exit_file = Path(folder) / "exit_code"
        environment = {**_cache_variables(caches, os.environ), **os.environ, EXIT_FILE: str(exit_file)}
        # An agent tells the others once where its store is, and one that comes back in a later round waits for it in
        # vain (torch 2.11, `dynamic_rendezvous.py`). Without the shared store every round says it again.
        if job.nnodes > 1 and job.max_restarts:
            environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        stop = _Forwarder()
        previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
        try:
            launcher_code = stop.run(job.command(program), environment, delay)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        left = read_exit_file(exit_file)
        code = true_exit_code(launcher_code, left[0] if left else None, asked_to_stop=stop.asked)
        if report is None:
            return code
        if left is None or left[1] == 0:
            report.write_text(f"{code}\n", encoding="utf-8")
        return ExitCode.OK if code == ExitCode.REQUEUE else code


def true_exit_code(launcher_code: int, reported: int | None, *, asked_to_stop: bool) -> int:
    """What a node's processes ended with.

    Args:
        launcher_code: torchrun's exit code: 0, or 1 for anything else.
        reported: What the node's first process wrote; None when it was killed before it could.
        asked_to_stop: Whether a stop signal came.
    """
    good = (ExitCode.OK, ExitCode.REQUEUE)
    if reported is not None and (launcher_code == 0 or reported not in good):
        return reported
    if reported is None and asked_to_stop:
        return ExitCode.REQUEUE
    return ExitCode.OK if launcher_code == 0 else ExitCode.FAILED


class _Forwarder:
    """Starts the launcher, and as signal handler asks its processes to save and leave, whatever the signal was."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.asked = False

    def run(self, command: Sequence[str], environment: Mapping[str, str], delay: float) -> int:
        """The launcher's exit code, after a wait; 0 when a signal came before it could start."""
        began = time.monotonic()
        while not self.asked and (left := delay - (time.monotonic() - began)) > 0:
            time.sleep(min(left, _NAP_SECONDS))
        if self.asked:
            return ExitCode.OK
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on.
        self.child = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.asked:  # between the look and the start, when there was nobody to hand it to
            self.child.terminate()
        return self.child.wait()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C is impatience; schedulers repeat the other signals.
        impatient = number == signal.SIGINT and self.asked
        self.asked = True
        if self.child is None:
            return
        workers = _workers(self.child.pid)
        if impatient or not workers:
            self.child.terminate()
            return
        for worker in workers:
            try:
                worker.send_signal(signal.SIGUSR1)
            except psutil.NoSuchProcess:
                continue


def _workers(launcher: int) -> list[psutil.Process]:
    """Processes that torchrun started: those of its children that it gave a rank."""
    found = []
    try:
        for child in psutil.Process(launcher).children():
            try:
                if "LOCAL_RANK" in child.environ():
                    found.append(child)
            except psutil.Error:
                continue
    except psutil.NoSuchProcess:
        return []
    return found


def _cache_variables(folder: Path | None, present: Mapping[str, str]) -> dict[str, str]:
    if folder is None:
        return {}
    chosen = {name: folder / sub for name, sub in _CACHES.items() if name not in present}
    for path in chosen.values():
        path.mkdir(parents=True, exist_ok=True)
    return {name: str(path) for name, path in chosen.items()}


def stagger_seconds(node: int, step: float) -> float:
    """How long a node waits before it starts, so that not all of them read the same files at once."""
    return min(node * step, MOST_STAGGER_SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m launch.node --nproc N ... -- -m MODULE ARGUMENT...`, once a node."""
    parser = argparse.ArgumentParser(prog="python -m launch.node", description="One node's share of a run.")
    parser.add_argument("--nproc", type=int, required=True, help="processes of this node")
    parser.add_argument("--nnodes", type=int, default=1, help="nodes of the run")
    parser.add_argument("--rendezvous", default="", help="HOST:PORT of the first node")
    parser.add_argument("--run-id", default="nemovl", help="name of the rendezvous")
    parser.add_argument("--max-restarts", type=int, default=0, help="restarts of the processes without leaving the job")
    parser.add_argument("--caches", type=Path, help="local folder for compiled kernels")
    parser.add_argument("--report", type=Path, help="file on shared storage for the run's exit code")
    parser.add_argument("--stagger", type=float, default=0.0, help="seconds between the starts of two nodes")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="-- -m MODULE ARGUMENT...")
    args = parser.parse_args(argv)
    job = NodeJob(
        nproc=args.nproc,
        nnodes=args.nnodes,
        rendezvous=args.rendezvous,
        run_id=args.run_id,
        max_restarts=args.max_restarts,
    )
    delay = stagger_seconds(int(os.environ.get("SLURM_PROCID", "0")), args.stagger)
    return run_node(job, args.program[1:], caches=args.caches, report=args.report, delay=delay)


if __name__ == "__main__":
    sys.exit(main())
