"""Choices of real Triton autotuners: tuned once, stored, handed to another process's kernels. Nothing is timed here."""

import json
import logging

import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.model.kernels.choices import choices_of, use_choices
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.kernel_choices import choices_file, settle

KEY = (128, 80, "torch.bfloat16")


def kernels() -> dict[str, Autotuner]:
    """Two autotuners as a new process has them: configurations, and nothing chosen."""

    def body(x):
        pass

    configs = [triton.Config({"BLOCK_SIZE_M": m}, num_warps=w) for m in (32, 64) for w in (4, 8)]
    return {name: triton.autotune(configs=list(configs), key=["n"])(triton.jit(body)) for name in ("a.fwd", "a.bwd")}


def tune(found: dict[str, Autotuner], timed: list[str], place: int = 2):
    """What running the kernels does: an autotuner that knows its key times nothing."""

    def rehearse() -> None:
        for name, kernel in found.items():
            if KEY not in kernel.cache:
                timed.append(name)
                kernel.cache[KEY] = kernel.configs[place]

    return rehearse


def test_one_process_tunes_and_the_next_does_not(tmp_path):
    path, timed = tmp_path / "deep" / "gpu.json", []
    first, second, other_rank = kernels(), kernels(), kernels()
    chosen = settle(first, path, tune(first, timed))
    assert sorted(timed) == ["a.bwd", "a.fwd"]
    assert use_choices(other_rank, json.loads(json.dumps(chosen))) == 2
    assert choices_of(other_rank) == chosen
    timed.clear()
    again = settle(second, path, tune(second, timed, place=0))
    assert timed == []
    assert again == chosen
    assert second["a.fwd"].cache[KEY] is second["a.fwd"].configs[2], "a kernel's own configuration, not a copy"


def test_other_sizes_are_tuned_and_added(tmp_path):
    path, timed = tmp_path / "gpu.json", []
    one = kernels()
    settle(one, path, tune(one, timed))
    stored = json.loads(path.read_text())
    stored["a.fwd"][0]["key"][0] = 256
    path.write_text(json.dumps(stored))
    timed.clear()
    two = kernels()
    settle(two, path, tune(two, timed))
    assert timed == ["a.fwd"]
    assert len(json.loads(path.read_text())["a.fwd"]) == 2


@pytest.mark.parametrize("text", ["", "[1]", '{"a.fwd": [{"key": 3}]}', '{"a.fwd": 1}'])
def test_a_broken_file_costs_a_tuning_and_is_made_again(tmp_path, caplog, text):
    path, timed = tmp_path / "gpu.json", []
    path.write_text(text)
    found = kernels()
    with caplog.at_level(logging.WARNING):
        settle(found, path, tune(found, timed))
    assert len(timed) == 2
    assert "is made again" in caplog.text
    assert json.loads(path.read_text()) == choices_of(found)


def test_a_configuration_of_another_version_is_left_out():
    found = kernels()
    row = {"key": list(KEY), "config": found["a.fwd"].configs[0].all_kwargs() | {"BLOCK_SIZE_M": 512}}
    assert use_choices(found, {"a.fwd": [row], "gone": [row]}) == 0
    assert found["a.fwd"].cache == {}


def test_a_file_is_for_one_kind_of_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nemovl_train.training.kernel_choices.version", lambda package: f"1+{package}")
    h100, h200 = choices_file("NVIDIA H100 80GB HBM3"), choices_file("NVIDIA H200")
    assert h100.parent == h200.parent == tmp_path / "nemovl" / "kernels"
    assert h100.name == "NVIDIA_H100_80GB_HBM3-triton1+triton-mamba_ssm1+mamba-ssm.json"
    assert h100 != h200


def test_a_rehearsal_touches_no_gradient():
    from small_vlm import CONFIG

    layout = Layout.create(ParallelConfig())
    model = build_model(CONFIG, layout, params_dtype=torch.float32, backend="torch")
    mixer = model.language_model.decoder.layers[CONFIG.language.hybrid_pattern.index("M")].mixer
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    for mixer.remakes_gated_norm in (False, True):
        mixer.rehearse(64)
    assert all(p.grad is None for p in mixer.parameters())
    assert all(torch.equal(p, before[name]) for name, p in mixer.named_parameters())
    layout.destroy()
