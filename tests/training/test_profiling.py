"""Where a step goes: sums of made-up kernels, and the page of a real run."""

import json
import time
from dataclasses import replace

import pytest
import running
import tiny_runs
import torch

from nemovl_train.config.schema import ProfileConfig
from nemovl_train.training.folder import StageFolder
from nemovl_train.training.profiling import Span, kind_of, page, recording, summary

KERNELS = [
    Span("nvjet_tst_gemm", 0.0, 4.0),
    Span("ncclDevKernel_AllGather_RING", 3.0, 6.0),
    Span("_chunk_scan_fwd_kernel", 8.0, 9.0),
    Span("ncclDevKernel_AllGather_RING", 9.5, 10.5),
]


def test_kernels_gaps_and_exposed_collectives_add_up():
    found = summary(KERNELS, 12.0, waits=[0.5, 1.0])
    assert found["kinds_ms"] == {"GEMM": 4.0, "collectives": 4.0, "scan chain": 1.0}
    assert (found["busy_ms"], found["gap_ms"], found["launches"]) == (8.0, 4.0, 4)
    # One millisecond of the first ran beside the product.
    assert found["collectives"]["exposed_ms"] == 3.0
    assert found["collectives"]["hidden_ms"] == 1.0
    assert found["longest_gaps"][0] == {"ms": 2.0, "before": "_chunk_scan_fwd_kernel"}
    assert (found["waits"], found["waits_ms"]) == (2, 1.5)
    halved = summary(KERNELS, 12.0, steps=2)
    assert halved["kinds_ms"]["GEMM"] == 2.0
    assert halved["gap_ms"] == 2.0
    text = page("a run", found)
    assert "collectives: 3.0 ms with nothing else running, 1.0 ms behind work" in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_qqtst_128x128_NNT", "GEMM"),
        ("void transformer_engine::block_scaled_1d_cast_transpose_kernel<float>", "FP8 casts"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("_state_passing_fwd_kernel", "scan chain"),
        ("multi_tensor_apply_kernel<AdamFunctorMaster>", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "collectives"),
        ("gloo:all_reduce", "collectives"),
        ("aten::addmm", "GEMM"),
        ("aten::mul", "norm, elementwise"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_operators_of_a_cpu_count_without_those_they_call():
    a = torch.randn(300, 300)
    with recording() as found:
        for _ in range(3):
            torch.nn.functional.linear(a, a)
        time.sleep(0.05)
    result = summary(found.spans(), found.wall_ms)
    by_name = {name: (ms, calls) for ms, calls, name in result["top"]}
    assert by_name["aten::mm" if "aten::mm" in by_name else "aten::addmm"][1] == 3
    assert result["kinds_ms"]["GEMM"] > 0
    assert result["busy_ms"] <= sum(result["kinds_ms"].values()) + 1e-6, "no operator counts twice"
    assert result["gap_ms"] > 45, "a sleep is a gap"


def test_a_run_is_profiled(data, tmp_path):
    config = replace(tiny_runs.run_config(data, tmp_path, steps=5), profile=ProfileConfig(steps=2, after=2, trace=True))
    running.run(config)
    folder = StageFolder.of(config).path / "profile"
    found = json.loads((folder / "summary.json").read_text())
    assert found["title"].endswith("steps 3 to 4, rank 0 of 1")
    assert found["kinds_ms"]["GEMM"] > 0
    assert found["busy_ms"] < found["wall_ms"]
    assert "aten::" in (folder / "summary.txt").read_text()
    assert (folder / "trace.json.gz").stat().st_size > 10_000
