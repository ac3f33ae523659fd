"""Loads a checkpoint in several layouts, writes down what each rank holds, and saves it again from that layout.

`python -m tests.convert.tp_ranks CHECKPOINT OUT T,D ...`: OUT/tpT_dpD/rankR.safetensors and OUT/tpT_dpD/checkpoints.
Ranks are forked, so that megatron-core is imported once for all of them.
"""

import os
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemovl_train.checkpoint import saving, sealed
from nemovl_train.config.build import build
from nemovl_train.config.schema import ModelConfig, ParallelConfig
from nemovl_train.convert.tensor_files import read_json
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout


def main(checkpoint: Path, out: Path, layouts: list[str]) -> None:
    for tp, dp in [tuple(map(int, text.split(","))) for text in layouts]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        children = []
        for rank in range(tp * dp):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    _rank(checkpoint, out / f"tp{tp}_dp{dp}", tp, rank, tp * dp, port)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        failed = [os.waitpid(child, 0)[1] for child in children]
        if any(failed):
            sys.exit(f"tp={tp} dp={dp}: exit states {failed}")


def _rank(checkpoint: Path, out: Path, tp: int, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    state = read_json(checkpoint / "state.json")
    problems: list[str] = []
    config = build(ModelConfig, state["model"], problems)
    assert not problems, problems
    layout = Layout.create(ParallelConfig(tp=tp))

    model = build_model(config, layout, params_dtype=getattr(torch, state["dtype"]), parts=config.parts, seed=1)
    sealed.load(checkpoint, model=model)
    out.mkdir(parents=True, exist_ok=True)
    held = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(held, out / f"rank{rank}.safetensors")
    (out / "checkpoints").mkdir(exist_ok=True)
    saving.save(out / "checkpoints", 0, model=model, optimizer=None, state=state, run_id="test")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
