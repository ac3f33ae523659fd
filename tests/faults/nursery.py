"""A warm process that forks the ranks of runs: importing megatron-core takes seconds, forking milliseconds.

It is a process of its own, started once: forking pytest's would copy the threads and process groups of other tests.
Reads one JSON request a line, answers each with the ranks' exit codes (negative: the signal that ended a rank). A
request is a run's `config`, or the recipe file of a `schedule` with the `root` of its runs.
"""

import copy
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from injector import Fault, Injector

from nemovl_train.config import compose
from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig, ScheduleConfig
from nemovl_train.exit_codes import ExitCode, guarded
from nemovl_train.training import trainer

AFTER_A_FAILURE_S = 8.0
KNOWN: dict[tuple[str, ...], object] = {}


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


def serve(request: dict) -> list[int]:
    ranks = request["ranks"]
    if "schedule" in request:
        prepare_schedule(request)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            child(request, rank, port)
        children[pid] = rank
    if request["kill_after_s"] is not None:
        time.sleep(request["kill_after_s"])
        for pid in children:
            kill(pid)
    return wait(children, request["timeout_s"])


def child(request: dict, rank: int, port: int) -> None:
    """One rank; never returns."""
    os.setsid()
    log = os.open(Path(request["out"]) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115 (for the life of the process)
    ranks = request["ranks"]
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        if request["fault"]:
            Injector(Fault(**request["fault"]), rank).install()
        if "schedule" in request:
            code = guarded(lambda: run_schedule(request))
        else:
            config = load_yaml(RunConfig, Path(request["config"]))
            record_packs(Path(config.run.root) / f"packs_rank{rank}.jsonl")
            code = guarded(lambda: trainer.run(config))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare_schedule(request: dict) -> None:
    """Import and compose what a schedule needs, for all that are forked from here on.

    Hydra composes a recipe again for each stage, three times in all, which takes longer than these stages train. What
    it makes of the same words is remembered; what differs between runs (folders, parents) is set afterwards.
    """
    importlib.import_module("nemovl_train.schedule.chain")
    if not KNOWN:
        plain = compose.compose

        def remembered(config_name: str, overrides: list[str]) -> object:
            key = (config_name, *overrides)
            if key not in KNOWN:
                KNOWN[key] = plain(config_name=config_name, overrides=overrides)
            return copy.deepcopy(KNOWN[key])

        compose.compose = remembered
    composed(request)


def composed(request: dict) -> ScheduleConfig:
    return compose.compose_schedule(request["schedule"], values={"run.root": request["root"]})


def run_schedule(request: dict) -> int:
    from nemovl_train.schedule import chain

    return chain.run(composed(request))


def kill(pid: int) -> None:
    """End a rank and what it started; one that has ended is a zombie until it is waited for."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # too young to have a session of its own
        os.kill(pid, signal.SIGKILL)


def record_packs(path: Path) -> None:
    """Note the digests of the packs that each step of this rank gets."""
    take = trainer.Trainer._next_packs

    def recorded(run: trainer.Trainer) -> object:
        packs, seconds = take(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps([run.state.step, [pack.digest() for pack in packs]]) + "\n")
        return packs, seconds

    trainer.Trainer._next_packs = recorded  # type: ignore[method-assign]


def wait(children: dict[int, int], timeout_s: float) -> list[int]:
    """Ranks that are left over are killed at the end of the time, or some seconds after one failed: as launchers do."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout_s
    while len(codes) < len(children):
        for pid in children:
            if children[pid] in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = codes[children[pid]] = os.waitstatus_to_exitcode(status)
                if code not in (0, ExitCode.REQUEUE):
                    end = min(end, time.monotonic() + AFTER_A_FAILURE_S)
        if time.monotonic() > end:
            for pid in children:
                if children[pid] not in codes:
                    kill(pid)
        time.sleep(0.01)
    return [codes[rank] for rank in range(len(children))]


if __name__ == "__main__":
    main()
