"""One of two processes that train the same packs under several engines. Rank 0 never gets an image.

    RANK=r WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python deepspeed_ranks.py DATA OUT.json ENGINE ...

An engine is `megatron/DTYPE` or `STAGE/DTYPE`, with `/offload` and `/recompute` where asked for. What the comparison
has to notice: `/averaged` leaves out the factor that undoes DeepSpeed's average over ranks, `/rounded` rounds to
bfloat16 what stays float32.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_runs

from data_pipelines.loader import PackStream
from nemovl_train.config.schema import EngineConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from nemovl_train.model import vision
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout, shutdown
from nemovl_train.training import deepspeed_engine
from nemovl_train.training.engine import open_engine
from nemovl_train.training.step import train_step

STEPS, PACKS = 20, 3


def config_of(name: str, data: Path):
    """A run's config, with everything on or off that the name says."""
    first, dtype, *options = name.split("/")
    engine = EngineConfig()
    if first != "megatron":
        engine = EngineConfig(
            name="deepspeed",
            zero_stage=int(first),
            offload_optimizer=bool({"offload", "optimizer"} & {*options}),
            offload_params="offload" in options and first == "3",
        )
    return replace(
        tiny_runs.run_config(data, data, global_batch=2 * PACKS),
        engine=engine,
        precision=PrecisionConfig(params=dtype, backend="torch"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5, eps=1e-6),
    )


def train(name: str, data: Path, layout: Layout) -> dict:
    """Losses, gradient norms, tiles of the step and of this rank."""
    config = config_of(name, data)
    model = build_model(
        config.model,
        layout,
        params_dtype=DTYPES[config.precision.params],
        backend="torch",
        seed=5,
        recompute=RecomputeConfig(language="full", vision="tiles") if "recompute" in name else None,
    )
    model.vision_model.max_tiles_per_chunk = 1  # ranks then differ in calls of the tower, not only in having any
    model.freeze(config.trainer.train)
    if "rounded" in name:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    engine = open_engine(model, layout, config)
    if "averaged" in name:
        engine.layout = replace(layout, dp=1)
    kinds = [("text",)] if layout.rank == 0 else [("text", "pictures"), ("text",)]
    streams = [
        PackStream(
            replace(tiny_runs.run_config(data, data, sources=kind).data, seq_length=256),
            tokens_per_tile=4,
            seed=1,
            global_batch=PACKS,
        )
        for kind in kinds
    ]
    found = {"loss": [], "norm": [], "tiles": [], "own_tiles": [], "dtypes": []}
    for step in range(STEPS):
        packs = next(streams[-1 if step % 5 == 4 else 0])  # every fifth step without any image
        result = train_step(engine, packs, layout, lr=1e-3, divisor="global")
        found["loss"].append(result.loss)
        found["norm"].append(result.grad_norm)
        found["tiles"].append(result.tiles)
        found["own_tiles"].append([int(pack.tiles.shape[0]) for pack in packs])
    for stream in streams:
        stream.close()
    mixer = model.language_model.decoder.layers[0].mixer
    found["dtypes"] = [str(mixer.A_log.dtype), str(mixer.dt_bias.dtype)]
    engine.close()
    return found


def main() -> None:
    data, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    deepspeed_engine.PERSISTENT_ELEMENTS = 0  # everything is small here, and would be kept whole
    vision.TILES_ENCODED_AGAIN = 1
    layout = Layout.create(ParallelConfig())
    found = {name: train(name, Path(data), layout) for name in names}
    Path(f"{out}.{layout.rank}").write_text(json.dumps(found))
    layout.destroy()
    shutdown()


if __name__ == "__main__":
    main()
