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

The step is the number of steps done when the point is reached. A fault strikes once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemovl_train.checkpoint import saving, sealed
from nemovl_train.evaluation import run as evaluation
from nemovl_train.training import step, trainer


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
