"""One fault at a named point of a run: "at point P of rank R in step S, do A".

    init        the trainer is being built
    data        the packs of a step are being fetched
    step        a step begins
    micro_batch between the first and the second micro-batch of a step
    accounted   a step is done
    eval        a held-out set is being scored
    save        a checkpoint is being staged
    write       its file is being written, in the background
    publish     it is about to get its name
    purge       an old one is about to go
    validation  a held-out set is being scored between two steps
    change      the file system is about to be changed by the first save of the run, for the `step`-th time

The step is the number of steps done when the point is reached. A fault strikes once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemovl_train.checkpoint import saving, sealed
from nemovl_train.evaluation import run as evaluation
from nemovl_train.training import step, trainer, validation


@dataclass(frozen=True)
class Fault:
    """What strikes where."""

    point: str
    action: str
    rank: int = 0
    step: int = 0


class Injector:
    """Arms one fault in this process."""

    def __init__(self, fault: Fault, rank: int) -> None:
        self.fault, self.rank, self.left, self.step = fault, rank, 1, 0
        self.trainer: Any = None

    def install(self) -> None:
        """Wrap the functions behind the points."""
        run = trainer.Trainer
        self._wrap(run, "__init__", lambda args: self._built(args[0]))
        self._wrap(run, "_next_packs", lambda args: self.reach("data", args[0].state.step))
        self._wrap(trainer, "train_step", lambda args: self.reach("step", self.now()))
        self._wrap(run, "save", lambda args: self.reach("save", args[0].state.step))
        self._wrap(saving.Saver, "_write", lambda args: self.reach("write", args[0]._current().step))
        self._wrap(sealed, "seal", lambda args: self.reach("publish", self.now()))
        self._wrap(sealed, "discard", lambda args: self.reach("purge", self.now()))
        self._wrap(evaluation, "score_source", lambda args: self.reach("eval", self.now()))
        self._wrap(run, "_account", lambda args: None, after=lambda args: self.reach("accounted", args[0].state.step))
        self._wrap(validation, "score_source", lambda args: self.reach("validation", self.now()))
        if self.fault.point == "change":
            Changes(self).install()
        stopping = trainer.Control.stopping

        def between(control: Any) -> bool:
            self.reach("micro_batch", self.now())
            return stopping(control)

        trainer.Control.stopping = between  # type: ignore[method-assign]

    def now(self) -> int:
        """Steps done."""
        return self.trainer.state.step if self.trainer is not None and hasattr(self.trainer, "state") else 0

    def reach(self, point: str, step: int) -> None:
        """Strike, when this is the place."""
        fault = self.fault
        if self.left and (point, self.rank, step) == (fault.point, fault.rank, fault.step):
            self.left = 0
            ACTIONS[fault.action](self)

    def _built(self, run: Any) -> None:
        self.trainer = run
        self.reach("init", 0)

    def _wrap(self, owner: Any, name: str, before: Callable, after: Callable = lambda args: None) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            before(args)
            result = inner(*args, **options)
            after(args)
            return result

        setattr(owner, name, wrapped)


class Changes:
    """Counts what the first save changes on the disk, from its folder to what retention leaves.

    Python reports every change before it happens: opening for writing, creating, renaming, removing. Flushing is added,
    so that a file that was written and never reached the disk is a case of its own.
    """

    EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "os.truncate")

    def __init__(self, injector: Injector) -> None:
        self.injector, self.seen, self.on = injector, 0, False
        self.flush = os.fsync

    def install(self) -> None:
        saver = saving.Saver

        def begin(args: Any) -> None:
            self.on = self.seen == 0

        self.injector._wrap(saver, "start", begin)
        self.injector._wrap(saver, "_done", lambda args: None, after=lambda args: setattr(self, "on", False))
        os.fsync = self._fsync
        sys.addaudithook(self._audit)

    def _fsync(self, descriptor: int) -> None:
        self._count()
        self.flush(descriptor)

    def _audit(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in self.EVENTS) and "checkpoints" in str(args[0]):
            self._count()

    def _count(self) -> None:
        if self.on:
            self.injector.reach("change", self.seen)
            self.seen += 1


def _flip(injector: Injector) -> None:
    """One bit of one weight, of any dtype and on any device."""
    import torch

    parameter = next(injector.trainer.model.parameters())
    parameter.data.view(-1).view(torch.uint8)[1:2].bitwise_xor_(1 << 4)


def _fail(injector: Injector) -> None:
    raise ValueError("injected")


def _spike(injector: Injector) -> None:
    """The next step's loss is a hundred times larger, and so are its gradients."""
    scales = step.loss_scales

    def larger(*args: Any) -> list[float]:
        step.loss_scales = scales
        return [scale * 100 for scale in scales(*args)]

    step.loss_scales = larger


ACTIONS: dict[str, Callable[[Injector], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "usr1": lambda _: os.kill(os.getpid(), signal.SIGUSR1),
    "group": lambda _: os.killpg(0, signal.SIGTERM),
    "hang": lambda _: time.sleep(600),
    "fail": _fail,
    "flip": _flip,
    "spike": _spike,
}
