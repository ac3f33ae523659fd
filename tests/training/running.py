"""Runs a trainer in this process and keeps what a comparison needs."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nemovl_train.config.schema import RunConfig
from nemovl_train.exit_codes import ExitCode
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.folder import StageFolder
from nemovl_train.training.signals import StopRequest
from nemovl_train.training.trainer import Trainer

TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "ranks")


@dataclass
class Outcome:
    """What a run left: exit code, final tensors by name, and the digests of the packs it took, by step."""

    code: ExitCode
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    digests: dict[int, list[str]] = field(default_factory=dict)


def run(config: RunConfig, prepare: Callable[[Trainer], None] = lambda trainer: None) -> Outcome:
    """`trainer.run`, with a hand on the trainer before it starts."""
    with StopRequest() as stop:
        return _run(config, prepare, stop)


def _run(config: RunConfig, prepare: Callable[[Trainer], None], stop: StopRequest) -> Outcome:
    layout = Layout.create(config.parallel, config.model.language)
    folder = StageFolder.of(config)
    try:
        folder.claim()
        trainer = Trainer(config, folder, layout, stop)
        digests: dict[int, list[str]] = {}
        take = trainer._next_packs

        def recorded():
            packs, seconds = take()
            digests[trainer.state.step] = [pack.digest() for pack in packs]
            return packs, seconds

        trainer._next_packs = recorded
        prepare(trainer)
        code = trainer.fit()
        return Outcome(code, trainer.state.to_json(), tensors_of(trainer), digests)
    finally:
        folder.release()
        layout.destroy()


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of every parameter and everything the optimizers hold."""
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for side in getattr(trainer.engine, "sides", ()):
        for number, inner in enumerate(getattr(side.optimizer, "chained_optimizers", [side.optimizer])):
            for name, tensor in _walk(inner.optimizer.state_dict()):
                found[f"{side.name}.{number}.{name}"] = tensor.clone()
    return found


def _walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value.detach()
        else:
            yield from _walk(value, f"{prefix}{key}.")


def assert_same_end(config: RunConfig, outcome: Outcome, other_config: RunConfig, other: Outcome) -> None:
    """Two runs ended bitwise alike: tensors, state, loss rows, and the packs both of them took."""
    # Their folders differ, and a folder is part of a config.
    assert {**outcome.state, "config_hash": ""} == {**other.state, "config_hash": ""}
    assert outcome.tensors.keys() == other.tensors.keys()
    different = [name for name, tensor in outcome.tensors.items() if not torch.equal(tensor, other.tensors[name])]
    assert not different
    assert rows(config) == rows(other_config)
    for step in outcome.digests.keys() & other.digests.keys():
        assert outcome.digests[step] == other.digests[step]


def rows(config: RunConfig) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times."""
    lines = (StageFolder.of(config).path / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def events(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    """Events of one kind."""
    lines = (StageFolder.of(config).path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def stop_at(step: int) -> Callable[[Trainer], None]:
    """Ask the run to stop, as a signal would, when it has done `step` steps."""

    def prepare(trainer: Trainer) -> None:
        account = trainer._account

        def accounted(*args: Any) -> None:
            account(*args)
            if trainer.state.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer._account = accounted

    return prepare
