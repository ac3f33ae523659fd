"""One stage or fine-tune: `nemovl train recipe=NAME`, or under torchrun `-m nemovl_train.train recipe=NAME`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from nemovl_train.config.app import USAGE, run_app
from nemovl_train.config.schema import RunConfig, ScheduleConfig
from nemovl_train.config.validate import refuse_processes
from nemovl_train.console import setup_logging
from nemovl_train.exit_codes import guarded
from nemovl_train.report.environment import record_environment


def train(argv: Sequence[str]) -> int:
    """Composes the recipe, checks it, and trains.

    Args:
        argv: `recipe=NAME`, overrides and Hydra flags.

    Returns:
        An exit code.
    """
    if {"-h", "--help"} & set(argv):
        print(USAGE.format(verb="train", what="Trains one stage or fine-tune; continues from its last checkpoint."))
        return 0
    return run_app("run", argv, _train_one)


def _train_one(config: RunConfig | ScheduleConfig) -> int:
    assert isinstance(config, RunConfig)
    setup_logging()
    refuse_processes([config])
    # Only here, behind every config error: torch and megatron-core take seconds to import.
    from nemovl_train.training import trainer

    record_environment(Path(config.run.root) / config.run.name)
    return trainer.run(config)


if __name__ == "__main__":
    sys.exit(guarded(lambda: train(sys.argv[1:])))
