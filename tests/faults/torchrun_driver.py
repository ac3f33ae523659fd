"""One rank under torchrun: `CONFIG [POINT ACTION RANK STEP]`; the fault strikes before the first restart only."""

import os
import sys
from pathlib import Path

from injector import Fault, Injector

from nemovl_train.config.dump import load_yaml
from nemovl_train.config.schema import RunConfig
from nemovl_train.exit_codes import guarded
from nemovl_train.training import trainer

if __name__ == "__main__":
    if len(sys.argv) > 2 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        point, action, rank, step = sys.argv[2:]
        Injector(Fault(point, action, int(rank), int(step)), int(os.environ["RANK"])).install()
    sys.exit(guarded(lambda: trainer.run(load_yaml(RunConfig, Path(sys.argv[1])))))
