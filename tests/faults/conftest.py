"""Data of the mini run, and runs of several ranks with a fault in them."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import tiny_runs

from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.schema import RunConfig

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "training"), str(HERE.parent / "schedule")]


@dataclass(frozen=True)
class Ended:
    """Exit codes and output of the ranks of a run."""

    codes: list[int]
    texts: list[str]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_data(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="session")
def nursery() -> Iterator[subprocess.Popen]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    }
    command = [sys.executable, str(HERE / "nursery.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def ask(nursery: subprocess.Popen, out: Path, *, ranks: int, timeout_s: float, **request: object) -> Ended:
    """Have the nursery start something, and wait for its end."""
    out.mkdir(exist_ok=True)
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    request |= {"ranks": ranks, "out": str(out), "timeout_s": timeout_s}
    nursery.stdin.write(json.dumps({"fault": None, "kill_after_s": None, **request}) + "\n")
    nursery.stdin.flush()
    ready, _, _ = select.select([nursery.stdout], [], [], timeout_s + 30)
    assert ready, "the ranks did not end"
    codes = json.loads(nursery.stdout.readline())
    return Ended(codes, [(out / f"rank{rank}.txt").read_text() for rank in range(ranks)])


@pytest.fixture
def run(nursery, tmp_path: Path) -> Callable[..., Ended]:
    """`run(config, ranks=2, fault=Fault(...))` starts a run and waits for its end."""

    def start(
        config: RunConfig,
        *,
        ranks: int = 1,
        fault: object = None,
        timeout_s: float = 60,
        kill_after_s: float | None = None,
    ) -> Ended:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        path = out / "config.yaml"
        path.write_text(dump_yaml(config))
        plain = asdict(fault) if fault is not None else None  # type: ignore[call-overload]
        request = {"config": str(path), "fault": plain, "kill_after_s": kill_after_s}
        return ask(nursery, out, ranks=ranks, timeout_s=timeout_s, **request)

    return start


@pytest.fixture(scope="session")
def schedule(nursery, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """`schedule(recipe, root)` starts a schedule and waits for its end."""
    out = tmp_path_factory.mktemp("out")

    def start(recipe: Path, root: Path, *, kill_after_s: float | None = None) -> Ended:
        request = {"schedule": str(recipe), "root": str(root), "kill_after_s": kill_after_s}
        return ask(nursery, out, ranks=1, timeout_s=200, **request)

    return start
