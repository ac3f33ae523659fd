"""Groups and legality of a layout, and tensor parallel ranks against one process.

Two gloo ranks are started once; they go through every case, making and destroying a layout for each.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nemovl_train.config.schema import LanguageConfig, ParallelConfig
from nemovl_train.exceptions import LayoutError
from nemovl_train.model.backend import TORCH
from nemovl_train.model.init import init_weights, join_parts
from nemovl_train.model.language import build_language_model
from nemovl_train.model.packing import PackParams
from nemovl_train.parallel.layout import Layout, shutdown
from nemovl_train.parallel.legality import layout_problems

CONFIG = LanguageConfig(
    hidden_size=32,
    hybrid_pattern="M-*-",
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    mamba_num_heads=8,
    mamba_head_dim=8,
    mamba_state_dim=8,
    mamba_num_groups=2,
    chunk_size=16,
    vocab_size=72,
    base_vocab_size=64,
)
SWIGLU = replace(CONFIG, activation="swiglu", position="rope")
LENGTHS = (7, 30, 2, 1)
CASES = {
    "tp2": (ParallelConfig(tp=2), CONFIG),
    "tp2_sp": (ParallelConfig(tp=2, sequence_parallel=True), CONFIG),
    "tp2_sp_swiglu_rope": (ParallelConfig(tp=2, sequence_parallel=True), SWIGLU),
    "dp2": (ParallelConfig(), CONFIG),
}


def run(layout, config):
    """Losses, whole logits and whole gradients, by whole parameter name."""
    model = build_language_model(config, layout, params_dtype=torch.float32, backend=TORCH)
    init_weights(model, seed=5, std=0.1, tp_size=layout.tp, tp_rank=layout.tp_rank)
    length = sum(LENGTHS)
    ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(length) % 3 == 0, -100, ids.roll(-1))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    seq_idx = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int()[None]
    pack = PackParams.from_boundaries(ends, seq_idx, max(LENGTHS))
    loss = model(ids, pack, labels)
    (loss * torch.linspace(0.5, 1.5, length)).sum().backward()
    out = {"loss": loss.detach(), "logits": model(ids, pack).detach()}
    group = layout.language_groups.tp
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=group)
        parts = [torch.empty_like(gradient) for _ in range(layout.tp)]
        dist.all_gather(parts, gradient.contiguous(), group=group)
        out[name] = join_parts(parts, parameter)
    return out


def worker(folder):
    """What each spawned rank does."""
    torch.set_num_threads(1)
    for name, (parallel, config) in CASES.items():
        layout = Layout.create(parallel, config)
        vision = layout.vision_groups
        assert (vision.tp.size(), vision.cp.size(), vision.dp.size(), vision.dp_cp.rank()) == (1, 1, 2, layout.rank)
        assert (layout.tp, layout.dp, layout.dp_rank) == (parallel.tp, 2 // parallel.tp, layout.rank // parallel.tp)
        result = run(layout, config)
        if layout.rank == 0:
            torch.save(result, f"{folder}/{name}.pt")
        layout.destroy()
    shutdown()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    store = f"file://{folder}/store"
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(folder), store, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    return {name: torch.load(f"{folder}/{name}.pt") for name in CASES}


@pytest.fixture(scope="module")
def one_process():
    layout = Layout.create(ParallelConfig())
    results = {id(config): run(layout, config) for config in (CONFIG, SWIGLU)}
    layout.destroy()
    return results


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(case, two_ranks, one_process):
    expected = one_process[id(CASES[case][1])]
    assert two_ranks[case].keys() == expected.keys()
    for name, tensor in expected.items():
        assert (two_ranks[case][name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_layouts_follow_each_other_in_one_process():
    for _ in range(2):
        layout = Layout.create(ParallelConfig())
        assert (layout.world_size, layout.dp, layout.device.type) == (1, 1, "cpu")
        total = torch.ones(1)
        dist.all_reduce(total, group=layout.vision_groups.dp)
        layout.destroy()


def test_refused_layout_names_the_nearest():
    with pytest.raises(LayoutError, match=r"set parallel\.tp=1"):
        Layout.create(ParallelConfig(tp=3))


@pytest.mark.parametrize(
    ("parallel", "world_size", "expected"),
    [
        (ParallelConfig(tp=2), 4, []),
        (ParallelConfig(tp=3), 8, ["does not divide the 8 processes; set parallel.tp=2", "set parallel.tp=2"]),
        (ParallelConfig(tp=4), 4, ["num_query_groups=2, mamba_num_groups=2; set parallel.tp=2"]),
        (ParallelConfig(tp=0), 4, ["set parallel.tp=1"]),
        (ParallelConfig(cp=2), 4, []),
        (ParallelConfig(sequence_parallel=True), 4, ["set parallel.sequence_parallel=false"]),
    ],
)
def test_problems(parallel, world_size, expected):
    problems = layout_problems(parallel, world_size, CONFIG)
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))


if __name__ == "__main__":
    folder, store, rank = sys.argv[1:]
    os.environ.pop("WORLD_SIZE", None)
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=2)
    worker(folder)
