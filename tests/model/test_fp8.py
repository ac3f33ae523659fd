"""Which layers run in the FP8 context, and when. What happens inside it needs a GPU (tests/gpu/test_gpu_fp8.py)."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_vlm import CONFIG

from nemovl_train.config.schema import ParallelConfig, PrecisionConfig, RecomputeConfig
from nemovl_train.exceptions import UserError
from nemovl_train.model import vlm
from nemovl_train.model.backend import TORCH
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.fp8 import forget_quantized_weights
from nemovl_train.parallel.layout import Layout

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

from gpu_packs import random_pack


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.fixture
def depth(monkeypatch):
    """Depth of the contexts entered now, and the log of linears called at depth 1, by name."""

    class Watch:
        def __init__(self) -> None:
            self.now, self.inside, self.outside = 0, [], []

        @contextmanager
        def context(self):
            self.now += 1
            try:
                yield
            finally:  # recomputation ends by an exception as soon as it has what it needs
                self.now -= 1

        def follow(self, model):
            for name, module in model.named_modules():
                if (hasattr(module, "weight") and "linear" in name) or name.endswith("_proj"):
                    module.register_forward_pre_hook(lambda *_, name=name: self.note(name))

        def note(self, name):
            assert self.now in (0, 1)
            (self.inside if self.now else self.outside).append(name)

    watch = Watch()
    monkeypatch.setattr(vlm, "select_backend", lambda _: replace(TORCH, fp8=lambda: watch.context))
    return watch


def build(layout, depth, *, recompute=None, **precision):
    model = vlm.build_model(
        CONFIG,
        layout,
        params_dtype=torch.float32,
        recompute=recompute,
        precision=PrecisionConfig(fp8="blockwise", **precision),
    )
    depth.follow(model)
    return model


def loss_of(model, layout):
    pack = random_pack(CONFIG, lengths=(70, 33, 130), tiles=(2, 0, 4), seq_length=256)
    return model(PackBatch.from_pack(pack, layout)).sum()


def places(names, part):
    return {int(name.split("layers.")[1].split(".")[0]) for name in names if name.startswith(part)}


@pytest.mark.parametrize(
    "recompute", [RecomputeConfig(), RecomputeConfig(language="full", vision="full"), RecomputeConfig(vision="tiles")]
)
def test_layers_between_the_ends_and_the_projector(recompute, layout, depth):
    model = build(layout, depth, recompute=recompute, bf16_layers=1, bf16_blocks=0)
    layers, blocks = CONFIG.language.num_layers, CONFIG.vision.num_layers
    loss = loss_of(model, layout)
    first = (set(depth.inside), set(depth.outside))
    assert places(depth.inside, "language_model") == set(range(1, layers - 1))
    assert places(depth.outside, "language_model") == {0, layers - 1}
    assert places(depth.inside, "vision_model") == set(range(blocks))
    assert {"projector.linear_fc1", "projector.linear_fc2"} <= set(depth.inside)
    depth.inside.clear()
    depth.outside.clear()
    loss.backward()
    again = RecomputeConfig() != recompute
    assert bool(depth.inside) == again, "what runs again in backward enters the context again"
    assert set(depth.inside) <= first[0]
    assert set(depth.outside) <= first[1]


def test_not_in_evaluation(layout, depth):
    model = build(layout, depth).eval()
    with torch.no_grad():
        loss_of(model, layout)
    assert depth.inside == []
    assert depth.outside


def test_all_layers_may_stay_out(layout, depth):
    model = build(layout, depth, bf16_layers=CONFIG.language.num_layers, bf16_blocks=CONFIG.vision.num_layers)
    loss_of(model, layout)
    assert set(depth.inside) == {"projector.linear_fc1", "projector.linear_fc2"}


def test_a_backend_without_fp8_is_refused(layout):
    with pytest.raises(UserError, match=r"set precision\.fp8=none"):
        vlm.build_model(
            CONFIG, layout, params_dtype=torch.float32, backend="torch", precision=PrecisionConfig(fp8="blockwise")
        )


def test_a_step_forgets_the_weights_of_the_one_before(layout, depth):
    """Stands in for Transformer Engine's cache: megatron-core's schedule calls this at the start of a step."""
    model = build(layout, depth)
    linear = model.language_model.decoder.layers[1]
    linear._fp8_workspaces = {"weight": object()}
    model.set_is_first_microbatch()
    assert linear._fp8_workspaces == {}
    assert linear.is_first_microbatch is False
    forget_quantized_weights(model)
