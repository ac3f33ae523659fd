"""A cluster of one machine: `sbatch`, `srun` and `scontrol` on PATH, and what slurmctld would do with their calls.

The commands only write down what was asked; the test plays the controller, so that time limits come at a chosen step
and not at a chosen second. `srun` starts one task for each node of the job, each a process group of its own.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SBATCH = """#!{python}
import os, pathlib, sys
spool = pathlib.Path(os.environ["FAKE_SLURM"])
if (spool / "refuse").exists() and len(list(spool.glob("job.*"))) >= int(os.environ.get("REFUSE_AFTER", "0")):
    sys.exit("sbatch: error: invalid partition specified: " + (spool / "refuse").read_text())
number = len(list(spool.glob("job.*"))) + 1
(spool / f"job.{{number}}").write_text("\\n".join(sys.argv[1:]))
print(f"{{number}};here")
"""
SCONTROL = """#!{python}
import os, pathlib, sys
spool = pathlib.Path(os.environ["FAKE_SLURM"])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
elif sys.argv[1] == "requeue":
    (spool / f"requeue.{{sys.argv[2]}}").touch()
elif sys.argv[1] == "update":
    with (spool / "updates").open("a") as file:
        file.write(" ".join(sys.argv[2:]) + "\\n")
else:
    sys.exit(f"scontrol: {{sys.argv[1:]}} is not known here")
"""
SQUEUE = """#!{python}
import os, pathlib, sys
waiting = pathlib.Path(os.environ["FAKE_SLURM"], "waiting")
wanted = [word.partition("=")[2].split(",") for word in sys.argv if word.startswith("--jobs=")]
for job in waiting.read_text().split() if waiting.exists() else []:
    if not wanted or job in wanted[0]:
        print(job)
"""
SCANCEL = """#!{python}
import os, pathlib, sys
pathlib.Path(os.environ["FAKE_SLURM"], "cancelled").write_text(" ".join(sys.argv[1:]))
"""
SRUN = """#!{python}
import os, pathlib, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
spool = pathlib.Path(os.environ["FAKE_SLURM"])
tasks = []
alone = "--nodes=1" in sys.argv
for node in range(1 if alone else int(os.environ["SLURM_JOB_NUM_NODES"])):
    env = dict(os.environ, SLURM_PROCID=str(node), SLURMD_NODENAME=f"fake{{node}}")
    tasks.append(subprocess.Popen(words, env=env, start_new_session=True))
(spool / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
(spool / "tasks").unlink()
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""


class FakeSlurm:
    """Spool folder, commands, and a controller."""

    def __init__(self, root: Path, *, nodes: int) -> None:
        self.spool, self.bin, self.nodes = root / "spool", root / "bin", nodes
        for folder in (self.spool, self.bin):
            folder.mkdir(parents=True)
        commands = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "scancel": SCANCEL}
        for name, text in commands.items():
            (self.bin / name).write_text(text.format(python=sys.executable))
            (self.bin / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.spool),
            "OMP_NUM_THREADS": "1",
        }

    def submitted(self) -> list[list[str]]:
        """Arguments of every sbatch call, in order."""
        jobs = sorted(self.spool.glob("job.*"), key=lambda path: int(path.suffix[1:]))
        return [path.read_text().splitlines() for path in jobs]

    def run(self, script: Path, restarts: int, limit: Callable[[], bool], *, timeout_s: float = 240) -> tuple[int, str]:
        """Run a job once. When `limit` says so, the time is up: tasks get the signal that the script asked for.

        Returns:
            The script's exit code and its output.
        """
        (line,) = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --signal=")]
        name = line.partition("=")[2].partition("@")[0]
        job = {
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NAME": "nemovl",
            "SLURM_JOB_NODELIST": ",".join(["localhost"] * self.nodes),
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        log = self.spool / f"log.{restarts}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", str(script)], env={**self.environment, **job}, stdout=out, stderr=subprocess.STDOUT
            )
            signalled, end = False, time.monotonic() + timeout_s
            while process.poll() is None:
                assert time.monotonic() < end, log.read_text()
                if not signalled and (self.spool / "tasks").is_file() and limit():
                    for task in (self.spool / "tasks").read_text().split():
                        os.killpg(int(task), getattr(signal, f"SIG{name}"))
                    signalled = True
                time.sleep(0.05)
        return process.returncode, log.read_text()

    def said(self, name: str) -> str:
        """What `updates` or `cancelled` of the controller hold; forgotten then."""
        path = self.spool / name
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def requeued(self) -> bool:
        """Whether the job asked to be queued again since the last look."""
        mark = self.spool / "requeue.1"
        found = mark.exists()
        mark.unlink(missing_ok=True)
        return found
