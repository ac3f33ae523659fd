"""One rank under torchrun: `CONFIG [POINT ACTION RANK STEP]`; the fault strikes before the first restart only.

`FAULTS_PACE_S` makes every step wait so long for its data, so that a signal from outside finds the run in its middle.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
from injector import Fault, Injector

from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exit_codes import guarded
from nemovl_train.training import trainer


def pace(seconds: float) -> None:
    take = trainer.Trainer._next_packs

    def slowly(run: trainer.Trainer) -> object:
        time.sleep(seconds)
        return take(run)

    trainer.Trainer._next_packs = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    if torch.cuda.is_available() and importlib.util.find_spec("mamba_ssm"):
        from gpu_packs import one_configuration_per_kernel

        one_configuration_per_kernel()  # tuning them would take minutes
    if len(sys.argv) > 2 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        point, action, rank, step = sys.argv[2:]
        Injector(Fault(point, action, int(rank), int(step)), int(os.environ["RANK"])).install()
    pace(float(os.environ.get("FAULTS_PACE_S", "0")))
    sys.exit(guarded(lambda: trainer.run(load_yaml(RunConfig, Path(sys.argv[1])))))
