import os
import signal
import subprocess
import sys

import pytest
import torch

from data_pipelines.config import ReadConfig
from data_pipelines.exceptions import DataError
from data_pipelines.loader import PackStream

STEPS, BATCH = 4, 6


def stream(config, **options):
    return PackStream(config, **{"tokens_per_tile": 4, "seed": 11, "global_batch": BATCH, **options})


@pytest.fixture(scope="module")
def config(mixed_folder, configure):
    return configure({"mixed": mixed_folder, "again": mixed_folder})


@pytest.fixture(scope="module")
def straight(config):
    """Digests of the packs of some steps, in stream order, as one rank sees them."""
    packs = stream(config)
    digests = [p.digest() for _ in range(STEPS) for p in next(packs)]
    assert packs.packs_consumed == STEPS * BATCH
    assert len(set(digests)) == len(digests)
    return digests


def step_of_all_ranks(ranks):
    """The packs of one step put back in stream order, and the fill packs."""
    per_rank = [next(rank) for rank in ranks]
    assert len({len(packs) for packs in per_rank}) == 1
    merged = [packs[i] for i in range(len(per_rank[0])) for packs in per_rank]
    return [p for p in merged if p.index >= 0], [p for p in merged if p.index < 0]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
def test_stream_is_the_same_for_any_number_of_ranks(config, straight, dp_size):
    ranks = [stream(config, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    for step in range(STEPS):
        packs, fill = step_of_all_ranks(ranks)
        assert [p.digest() for p in packs] == straight[step * BATCH : (step + 1) * BATCH]
        assert [p.index for p in packs] == list(range(step * BATCH, (step + 1) * BATCH))
        assert len(fill) == -BATCH % dp_size
        assert not any(p.loss_weight.any() or p.sample_keys or len(p.tiles) for p in fill)
    assert {rank.packs_consumed for rank in ranks} == {STEPS * BATCH}
    assert len({rank.plan_hash for rank in ranks}) == 1


def test_resume_continues_with_other_ranks(config, straight):
    ranks = [stream(config, dp_rank=r, dp_size=3, start_pack=2 * BATCH) for r in range(3)]
    digests = [p.digest() for _ in range(2) for p in step_of_all_ranks(ranks)[0]]
    assert digests == straight[2 * BATCH :]


# (ranks, workers of each rank), one after the other, two steps each; 4 and 8 ranks do not divide the batch of 6
SCHEDULE = [(4, 0), (3, 1), (6, 0), (8, 0), (1, 2)]


def test_one_integer_is_all_that_a_stop_keeps(mixed_folder, configure):
    """Ranks and workers change at every stop, as on a cluster that shrinks and grows; the stream does not."""
    folders = {"mixed": mixed_folder, "again": mixed_folder}
    straight = stream(configure(folders))
    expected = [p.digest() for _ in range(2 * len(SCHEDULE)) for p in next(straight)]
    consumed, seen = 0, []
    for dp_size, workers in SCHEDULE:
        # Processes are dear: the first rank has workers, the others build for themselves.
        ranks = [
            stream(configure(folders, num_workers=0 if r else workers), dp_rank=r, dp_size=dp_size, start_pack=consumed)
            for r in range(dp_size)
        ]
        for _ in range(2):
            packs, fill = step_of_all_ranks(ranks)
            seen += [p.digest() for p in packs]
            assert len(fill) == -BATCH % dp_size
        positions = {rank.packs_consumed for rank in ranks}
        for rank in ranks:
            rank.close()
        (consumed,) = positions
    assert seen == expected


def test_prefetch_is_bounded(mixed_folder, configure):
    """A worker never builds further ahead than it was told: long packs are large."""
    packs = stream(configure({"mixed": mixed_folder}, num_workers=1, read=ReadConfig(prefetch=1)), global_batch=1)
    asked = []
    plan_pack = packs.plan.pack
    packs.plan.pack = lambda number: asked.append(number) or plan_pack(number)
    for _ in range(3):
        next(packs)
    assert max(asked) <= 3 + 1
    packs.close()


def test_workers_change_nothing_and_outlive_signals(straight, mixed_folder, configure):
    working = configure({"mixed": mixed_folder, "again": mixed_folder}, num_workers=2)
    before = torch.get_rng_state()
    packs = stream(working, start_pack=BATCH)
    digests = [p.digest() for p in next(packs)]
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    digests += [p.digest() for _ in range(2) for p in next(packs)]
    assert torch.equal(before, torch.get_rng_state())
    assert packs.packs_consumed == STEPS * BATCH
    packs.close()
    assert not any(worker.is_alive() for worker in workers)
    assert digests == straight[BATCH:]


def test_two_names_of_one_folder_get_two_orders(config):
    packs = next(stream(config, global_batch=30))
    drawn = [pair for p in packs for pair in zip(p.dataset_ids, p.sample_keys, strict=True)]
    mixed, again = ([key for name, key in drawn if name == wanted] for wanted in ("mixed", "again"))
    assert len(mixed) > 20
    assert mixed != again


def test_tile_size_must_be_the_models(config):
    with pytest.raises(DataError, match="gives 4 tokens a tile, the model has 256"):
        stream(config, tokens_per_tile=256)


def test_config_needs_no_torch():
    code = "import data_pipelines.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=os.getcwd()).returncode == 0


def test_pinning_reaches_every_tensor_and_changes_nothing(config, straight, monkeypatch):
    """PyTorch's loader hands what comes from a worker to this function; without a device locking is a copy here."""
    from torch.utils.data._utils.pin_memory import pin_memory

    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self.clone()) or locked[-1])
    packs = stream(config)
    built = next(packs._built)
    pinned = pin_memory(built)
    assert pinned.pack.digest() == built.pack.digest() == straight[0]
    tensors = [value for value in vars(pinned.pack).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == len(locked) > 7
    assert all(any(tensor is copy for copy in locked) for tensor in tensors)
    assert pinned.outcomes == built.outcomes
