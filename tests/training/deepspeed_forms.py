"""What the tests of DeepSpeed's engine share. An engine is named STAGE/DTYPE.

`/offload` has the host keep what it can, `/optimizer` optimizer state alone.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch

from nemovl_train.config.schema import EngineConfig, PrecisionConfig, RunConfig

INSTALLED = importlib.util.find_spec("deepspeed") is not None
WHY_NOT = "the extra `deepspeed` is not installed: pip install -e '.[deepspeed]'"
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason=WHY_NOT)


def with_engine(config: RunConfig, form: str) -> RunConfig:
    stage, params, *options = form.split("/")
    engine = EngineConfig(
        name="deepspeed",
        zero_stage=int(stage),
        offload_optimizer=bool({"offload", "optimizer"} & {*options}),
        offload_params="offload" in options and stage == "3",
    )
    trainer = replace(config.trainer, check_replicas_every=0)
    return replace(config, engine=engine, precision=PrecisionConfig(params=params, backend="torch"), trainer=trainer)


def everything(engine) -> dict[str, torch.Tensor]:
    weights = engine.weights.sharded_state_dict()
    found = {name: entry.data.clone() for name, entry in weights.items()}
    for part in engine.sharded_state_dict(weights).values():
        found |= {name: entry.data.clone() for name, entry in part.items()}
    return found


def all_equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
