"""Legal layouts of a run on a number of GPUs, best first."""

from collections.abc import Iterator
from dataclasses import replace

from nemovl_train.config.schema import RunConfig
from nemovl_train.config.validate import validate_run
from nemovl_train.exceptions import ConfigError
from nemovl_train.plan.planner import Plan, make_plan


def search(config: RunConfig) -> list[Plan]:
    """Plans every legal layout: those that fit by time, then those that do not by memory.

    Tensor parallelism stays inside a node, with sequence parallelism; pipelines do not exist.

    Args:
        config: A validated config; `cluster.gpus` says on how many GPUs.

    Raises:
        ConfigError: The number of GPUs is missing, or no layout is legal.
    """
    if config.cluster.gpus is None:
        raise ConfigError(["cluster.gpus is empty; say how many GPUs to search for: cluster.gpus=8"])
    plans = [make_plan(candidate) for candidate in _candidates(config) if not validate_run(candidate)]
    if not plans:
        reasons = sorted({problem for candidate in _candidates(config) for problem in validate_run(candidate)})
        raise ConfigError([f"no layout on {config.cluster.gpus} GPUs is legal; among the reasons: {reasons[0]}"])
    return sorted(plans, key=lambda plan: (not plan.fits, plan.time.total if plan.fits else plan.memory.total))


def _candidates(config: RunConfig) -> Iterator[RunConfig]:
    gpus = config.cluster.gpus or 1
    for tp in _divisors(min(gpus, config.cluster.gpus_per_node)):
        for cp in _divisors(gpus // tp):
            yield replace(config, parallel=replace(config.parallel, tp=tp, cp=cp, sequence_parallel=tp > 1))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
