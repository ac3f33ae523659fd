"""The projector against the one inside Transformers' Omni class."""

import pytest
import torch
from hf_oracle import relative_difference
from tiny import TINY
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import NemotronH_Omni_Reasoning_V3MultiModalProjector

from nemovl_train.model.backend import select_backend
from nemovl_train.model.projector import Projector

NATIVE_NAMES = {
    "norm.weight": "layer_norm.weight",
    "linear_fc1.weight": "linear_1.weight",
    "linear_fc2.weight": "linear_2.weight",
}


@pytest.fixture
def pair(layout):
    ours = Projector(TINY, layout, torch.float32, select_backend("torch"))
    theirs = NemotronH_Omni_Reasoning_V3MultiModalProjector(
        4 * TINY.vision.hidden_size, TINY.projector.ffn_hidden_size, TINY.language.hidden_size
    )
    with torch.no_grad():
        theirs.layer_norm.weight.uniform_(0.5, 1.5)  # at its initial 1 a forgotten weight would not show
    state = theirs.state_dict()
    missing = ours.load_state_dict({name: state[native] for name, native in NATIVE_NAMES.items()}, strict=False)
    assert not [name for name in missing.missing_keys if not name.endswith("_extra_state")]
    return ours, theirs


def test_same_output_and_gradients_as_transformers(pair):
    ours, theirs = pair
    features = torch.randn(3, 4, 4 * TINY.vision.hidden_size)
    # Features near zero make the norm's epsilon matter.
    features[0] *= 1e-3
    inputs = [features.clone().requires_grad_(), features.clone().requires_grad_()]
    outputs = [module(x) for module, x in zip(pair, inputs, strict=True)]
    assert relative_difference(*outputs) < 1e-5
    for output in outputs:
        output.square().sum().backward()
    assert relative_difference(inputs[0].grad, inputs[1].grad) < 1e-5
    native = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_difference(parameter.grad, native[NATIVE_NAMES[name]].grad) < 1e-5, name


def test_frozen_projector_still_passes_gradients_down(pair):
    ours, _ = pair
    ours.requires_grad_(False)
    features = torch.randn(2, 4, 4 * TINY.vision.hidden_size, requires_grad=True)
    ours(features).square().sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in ours.parameters())
