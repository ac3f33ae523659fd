"""The whole model: against Transformers' own class, and everything that happens where the parts join."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hf_oracle import canonical_gradients, copy_weights, native_inputs, relative_difference, tiny_omni
from tiny import ONE_PROCESS, TINY, Sample, make_pack
from torch import Tensor

from nemovl_train.config.schema import PARTS
from nemovl_train.exceptions import ConfigError, DataError
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL, build_model

# isort: split
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

TEXT_ONLY = Sample.random(5, text=(37,))


def build(layout, parts=None, dtype=torch.float32) -> NemotronVL:
    """A model in training mode whose every tensor matters, so that a forgotten one shows."""
    model = build_model(TINY, layout, params_dtype=dtype, backend="torch", parts=parts, seed=7).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.dim() == 1 or "vision_model" in name else 0.05
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.train()


def batch_of(*samples: Sample, seq_length: int | None = None) -> PackBatch:
    return PackBatch.from_pack(make_pack(samples, seq_length or sum(len(s.ids) for s in samples)), ONE_PROCESS)


def gradients(model: NemotronVL) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_same_logits_loss_and_gradients_as_transformers(layout):
    """Two tiles of one image and a tile of another, between text; 55 tokens, which no chunk length divides."""
    sample = Sample.random(1, text=(6, 5, 32), tiles=(2, 1))
    batch, model, native = batch_of(sample), build(layout), tiny_omni(TINY)
    copy_weights({name: parameter.detach() for name, parameter in model.named_parameters()}, TINY, "vlm", native)

    theirs = native(**native_inputs(TINY, sample.ids, sample.tiles)).logits[0]
    assert relative_difference(model.logits(batch), theirs) < 1e-4

    losses = model(batch)
    expected = F.cross_entropy(theirs, batch.labels, ignore_index=-100, reduction="none")
    assert losses.shape == batch.labels.shape
    assert losses.dtype == torch.float32
    assert relative_difference(losses, expected) < 1e-4

    losses.sum().backward()
    expected.sum().backward()
    ours, reference = gradients(model), canonical_gradients(native, TINY, "vlm")
    assert ours.keys() == reference.keys()
    worst = {name: relative_difference(ours[name], reference[name]) for name in ours}
    assert max(worst.values()) < 1e-4, max(worst, key=worst.__getitem__)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_packed_equals_alone(layout, dtype, bound):
    """Outputs and gradients of three samples in one pack, with a padding tail, against each sample by itself."""
    model = build(layout, dtype=dtype)
    samples = [
        Sample.random(2, text=(7, 12), tiles=(3,)),
        Sample.random(3, text=(33,)),
        Sample.random(4, text=(1, 2, 9), tiles=(1, 2)),
    ]
    packed = model(batch_of(*samples, seq_length=128))
    packed.sum().backward()
    together = gradients(model)
    alone = []
    for sample in samples:
        losses = model(batch_of(sample))
        losses.sum().backward()
        alone.append(losses.detach())
    length = sum(map(len, alone))
    assert relative_difference(packed[:length], torch.cat(alone)) < bound
    assert not packed[length:].any()
    for name, gradient in gradients(model).items():
        assert relative_difference(together[name], gradient) < bound, name


def test_tiles_may_come_in_any_order(layout):
    model = build(layout).eval()
    batch = batch_of(Sample.random(6, text=(4, 3, 8), tiles=(2, 1)))
    order = torch.tensor([2, 0, 1])
    pack = replace(batch.pack, tiles=batch.pack.tiles[order], tile_token_start=batch.pack.tile_token_start[order])
    assert relative_difference(model.logits(PackBatch.from_pack(pack, ONE_PROCESS)), model.logits(batch)) < 1e-6


def test_loss_is_that_of_the_logits(layout):
    model = build(layout)
    batch = batch_of(Sample.random(8, text=(9, 20), tiles=(1,)), seq_length=64)
    batch.pack.labels[12:20] = -100
    batch = PackBatch.from_pack(batch.pack, ONE_PROCESS)
    logits = model.logits(batch)
    expected = F.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="none")
    assert relative_difference(model(batch), expected) < 1e-6
    asked = torch.tensor([40, 3])
    assert relative_difference(model.logits(batch, asked), logits[asked]) < 1e-6


def test_wrong_number_of_image_tokens_names_sample_and_counts(layout):
    model = build(layout)
    pack = make_pack([TEXT_ONLY, Sample.random(9, text=(4, 6), tiles=(2,))], 64)
    literal = replace(pack, input_ids=pack.input_ids.index_fill(0, torch.tensor([3]), TINY.tokens.image))
    with pytest.raises(DataError, match=r"'sample-0' has 1 image tokens .* but 0 tiles, which give 0 visual features"):
        model(PackBatch.from_pack(literal, ONE_PROCESS))
    lost = replace(pack, tiles=pack.tiles[:1], tile_token_start=pack.tile_token_start[:1])
    with pytest.raises(DataError, match=r"'sample-1' has 8 image tokens .* but 1 tiles, which give 4 visual features"):
        model(PackBatch.from_pack(lost, ONE_PROCESS))


def test_misplaced_tiles_are_refused(layout):
    model = build(layout)
    pack = make_pack([Sample.random(9, text=(4, 6), tiles=(2,))], 32)
    moved = replace(pack, tile_token_start=pack.tile_token_start + 1)
    with pytest.raises(DataError, match="not where"):
        model(PackBatch.from_pack(moved, ONE_PROCESS))
    with pytest.raises(DataError, match=r"2 tiles but 1 starts"):
        model(PackBatch.from_pack(replace(pack, tile_token_start=pack.tile_token_start[:1]), ONE_PROCESS))
    with pytest.raises(DataError, match=r"data.tile_size=64"):
        model(PackBatch.from_pack(replace(pack, tiles=pack.tiles[..., :32, :32]), ONE_PROCESS))


def test_text_only_pack_leaves_the_tower_alone(layout, monkeypatch):
    model = build(layout)
    monkeypatch.setattr(model.vision_model, "encode", None)  # would fail when called
    model(batch_of(TEXT_ONLY)).sum().backward()
    assert {name.split(".")[0] for name in gradients(model)} == {"language_model"}


def test_projector_alone_gets_its_gradient_through_the_frozen_language_model(layout):
    model = build(layout)
    batch = batch_of(Sample.random(10, text=(5, 21), tiles=(2,)))
    model(batch).sum().backward()
    expected = gradients(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.freeze(train=("projector",))
    seen = []
    model.projector.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].requires_grad))
    model(batch).sum().backward()
    found = gradients(model)
    assert seen == [False], "a frozen tower must not build a graph"
    assert found.keys() == {name for name in expected if name.startswith("projector.")}
    for name, gradient in found.items():
        assert relative_difference(gradient, expected[name]) < 1e-6, name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_tower_alone_gets_its_gradient_through_frozen_projector_and_language_model(layout):
    model = build(layout)
    batch = batch_of(Sample.random(10, text=(5, 21), tiles=(2,)))
    model(batch).sum().backward()
    expected = gradients(model)
    model.freeze(train=("vision",))
    model(batch).sum().backward()
    found = gradients(model)
    assert found.keys() == {name for name in expected if name.startswith("vision_model.")}
    for name, gradient in found.items():
        assert relative_difference(gradient, expected[name]) < 1e-6, name


def test_nothing_to_train_in_a_pack_still_has_a_backward_pass(layout):
    """Projector warm-up meets packs without images, and fill packs without labels: zero gradient, no error."""
    model = build(layout)
    model.freeze(train=("projector",))
    model(batch_of(TEXT_ONLY)).sum().backward()
    assert not gradients(model)
    model.freeze(train=PARTS)
    pack = make_pack([TEXT_ONLY], 48)
    pack.labels.fill_(-100)
    losses = model(PackBatch.from_pack(pack, ONE_PROCESS))
    assert not losses.any()
    losses.sum().backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_parts_by_themselves(layout):
    language = build(layout, parts=("language",))
    assert language.part_modules().keys() == {"language"}
    assert language(batch_of(TEXT_ONLY)).sum() > 0
    with pytest.raises(DataError, match="no vision tower"):
        language(batch_of(Sample.random(9, text=(4, 6), tiles=(2,))))
    tower = build(layout, parts=("vision",))
    assert tower.vision_model.encode(Sample.random(1, text=(1, 1), tiles=(2,)).tiles).shape == (2, 4, 192)
    with pytest.raises(ConfigError, match="language"):
        tower.freeze(train=("language",))


def test_initial_weights_depend_on_seed_and_name_only(layout):
    def weights(**options) -> dict[str, Tensor]:
        model = build_model(TINY, layout, params_dtype=torch.float32, backend="torch", **options)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    torch.manual_seed(1)
    whole = weights(seed=3)
    torch.manual_seed(2)
    language = weights(seed=3, parts=("language",))
    other = weights(seed=4)
    assert all(torch.equal(whole[name], tensor) for name, tensor in language.items())
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
    assert any(not torch.equal(whole[name], tensor) for name, tensor in other.items())


def test_checkpoint_names_are_parameter_names(layout):
    model = build(layout)
    state = model.sharded_state_dict()
    assert state.keys() == dict(model.named_parameters()).keys()
    # megatron-core stores the convolution under its former name; every other key is the name itself.
    assert {name: value.key.replace("conv1d.", "conv1d_") for name, value in state.items()} == {n: n for n in state}
    loaded = build_model(TINY, layout, params_dtype=torch.float32, backend="torch", seed=8)
    loaded.load_state_dict({name: value.data for name, value in state.items()}, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_runs_under_megatrons_schedule(layout):
    model = build(layout)
    batches = [batch_of(Sample.random(11, text=(5, 9), tiles=(1,)), seq_length=32), batch_of(TEXT_ONLY, seq_length=48)]
    expected = torch.stack([model(batch).sum() for batch in batches]).sum()
    expected.backward()
    reference = gradients(model)
    model.config.calculate_per_token_loss = True

    def step(iterator, stage):
        return stage(next(iterator)), lambda losses: (
            losses.sum(),
            torch.ones((), dtype=torch.int),
            {"loss": losses.sum()},
        )

    forward_backward_no_pipelining(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=2,
        seq_length=48,
        micro_batch_size=1,
        forward_only=False,
        pg_collection=layout.language_groups,
    )
    for name, gradient in gradients(model).items():
        assert relative_difference(gradient, reference[name]) < 1e-6, name
