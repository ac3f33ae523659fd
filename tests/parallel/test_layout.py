"""Legality of a layout, and who may ask for process groups. Layouts of several ranks: `test_matrix.py`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemovl_train.config.schema import LanguageConfig, ParallelConfig
from nemovl_train.exceptions import LayoutError
from nemovl_train.parallel.layout import Layout
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


def test_layouts_follow_each_other_in_one_process():
    for _ in range(2):
        layout = Layout.create(ParallelConfig())
        assert (layout.world_size, layout.dp, layout.device.type) == (1, 1, "cpu")
        total = torch.ones(1)
        dist.all_reduce(total, group=layout.vision_groups.dp)
        layout.destroy()


def test_groups_are_destroyed_in_an_order_that_every_rank_shares(monkeypatch):
    """NCCL hangs otherwise. megatron-core's collection lists its groups in an order of each process's own."""
    destroyed, real = [], dist.destroy_process_group

    def destroy(group):
        destroyed.append(int(group.group_name))
        real(group)

    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    orders = []
    for backwards in (False, True):
        layout = Layout.create(ParallelConfig())
        found = vars(layout.language_groups)
        for name in sorted(found, reverse=backwards):
            found[name] = found.pop(name)
        destroyed.clear()
        layout.destroy()
        orders.append([number - min(destroyed) for number in destroyed])
    assert orders[0] == orders[1]
    assert len(orders[0]) > 1


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
        (ParallelConfig(cp=3), 4, ["does not divide the 4 processes; set parallel.cp=2, or start a multiple of 3"]),
        (ParallelConfig(cp=2), 1, ["does not divide the one process; set parallel.cp=1, or start a multiple of 2"]),
        (ParallelConfig(tp=2, cp=2), 3, ["does not divide the 3 processes; start a multiple of 4 processes"]),
        (ParallelConfig(tp=2, cp=4, mamba_context="head_exchange"), 8, ["or parallel.cp=1"]),
        (ParallelConfig(cp=2, mamba_context="head_exchange"), 4, []),
        (ParallelConfig(cp=4, mamba_context="head_exchange"), 4, ["set parallel.mamba_context=state_passing"]),
        (ParallelConfig(sequence_parallel=True), 4, ["set parallel.sequence_parallel=false"]),
    ],
)
def test_problems(parallel, world_size, expected):
    problems = layout_problems(parallel, world_size, CONFIG)
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))


def test_models_without_mamba_layers_exchange_no_heads():
    attention_alone = replace(CONFIG, hybrid_pattern="*-")
    assert layout_problems(ParallelConfig(cp=4, mamba_context="head_exchange"), 4, attention_alone) == []


def test_no_other_module_asks_for_process_groups():
    package = Path(__file__).parents[2] / "nemovl_train"
    asking = [path.name for path in package.rglob("*.py") if "parallel_state" in path.read_text()]
    assert asking == ["layout.py"]


def test_shares_of_a_pack():
    """Numbers alone: what ranks of TP 2 x CP 2 hold, with and without sequence parallelism."""
    known = {"world_size": 4, "rank": 1, "dp": 1, "dp_rank": 0, "mamba_context": "state_passing", "device": None}
    groups = {"language_groups": None, "vision_groups": None, "control": None}
    mine = {"tp": 2, "cp": 2, "tp_rank": 1, "cp_rank": 1}
    for sequence_parallel, expected in ((False, range(32, 64)), (True, range(48, 64))):
        layout = Layout(**known, **groups, **mine, sequence_parallel=sequence_parallel)
        assert layout.pack_rank == 3
        assert layout.context_tokens(64) == range(32, 64)
        assert layout.residual_tokens(64) == expected
        assert layout.residual_tokens(64, 0).start == 0
