"""The whole model under tensor and sequence parallelism of its language part, on two CPU processes."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from hf_oracle import relative_difference
from tiny import TINY, Sample, make_pack

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout

VISUAL = ("vision_model.", "projector.")


POSITIONS = (3, 10, 24, 40)


def outcome(layout: Layout) -> dict[str, torch.Tensor]:
    """Gradients of tower and projector, summed over all processes as their DDP does, and logits at some positions."""
    model = build_model(TINY, layout, params_dtype=torch.float32, backend="torch", seed=7).train()
    pack = make_pack([Sample.random(10, text=(5, 20), tiles=(2,))], 64)
    batch = PackBatch.from_pack(pack, layout)
    model(batch).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if name.startswith(VISUAL)}
    for gradient in found.values():
        dist.all_reduce(gradient)
    with torch.no_grad():
        found["logits"] = model.logits(batch, torch.tensor(POSITIONS))
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for sequence_parallel in (False, True):
        layout = Layout.create(ParallelConfig(tp=2, sequence_parallel=sequence_parallel))
        found = outcome(layout)
        if rank == 0:
            torch.save(found, f"{folder}/{sequence_parallel}.pt")
        layout.destroy()
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(layout, tmp_path: Path, monkeypatch):
    """Every rank holds the whole gradient of the visual tokens, which summed would count twice; logits at positions of
    the whole pack come out although every rank holds half of its rows."""
    expected = outcome(layout)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for sequence_parallel in (False, True):
        found = torch.load(tmp_path / f"{sequence_parallel}.pt")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert relative_difference(value, expected[name]) < 1e-5, (sequence_parallel, name)
