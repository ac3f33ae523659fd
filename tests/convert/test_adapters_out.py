"""Adapters on their way out: merged weights give the same logits, and `peft` on Transformers' own model as well."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

from nemovl_train.checkpoint import base as base_module
from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import base_of, parent_of, refuse_adapters
from nemovl_train.checkpoint.streamed import StoredTensors
from nemovl_train.config.dump import dump_yaml
from nemovl_train.config.schema import AdapterConfig, AdapterTargets
from nemovl_train.convert import adapters as adapters_out
from nemovl_train.convert import hf_export, merging
from nemovl_train.convert.adapters import export_adapters, export_merged, merge_checkpoint
from nemovl_train.convert.checkpoints import (
    export_checkpoint,
    find_checkpoint,
    import_checkpoint,
    single_process_model,
)
from nemovl_train.convert.ours_check import compute
from nemovl_train.convert.probe import make_probe
from nemovl_train.convert.verify import verify
from nemovl_train.exceptions import CheckpointError, ConversionError
from nemovl_train.training import trainer
from nemovl_train.training.folder import StageFolder

from .test_streaming import Watched


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_data(tmp_path_factory.mktemp("data"))


def adapted_run(data, root, targets, *, params="fp32", parts=("vision", "projector", "language"), train=(), base=None):
    """The folder of a run with adapters whose second halves have moved far, on a base of one step."""
    config = tiny_runs.run_config(data, root, sources=("text",), steps=1, train=parts)
    precision = replace(config.precision, params=params)
    config = replace(config, precision=precision, model=replace(config.model, parts=parts))
    if base is None:
        trainer.run(config)
    trained = replace(config.trainer, init_from=str(base or StageFolder.of(config).path), train=train, steps=3)
    if "vision" in parts:
        pictures = tiny_runs.run_config(data, root, sources=("pictures",)).data
        config = replace(config, data=pictures)
    config = replace(
        config,
        run=replace(config.run, stage="adapters"),
        trainer=trained,
        adapter=AdapterConfig(rank=4, alpha=16.0, targets=targets),
        optim=replace(config.optim, lr=0.05, warmup_fraction=0.0),
    )
    trainer.run(config)
    return StageFolder.of(config).path, config


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    targets = AdapterTargets(vision=("*",), projector=("*",), language=("*",))
    return adapted_run(data, tmp_path_factory.mktemp("whole"), targets)


@pytest.fixture(scope="module")
def text(data, tmp_path_factory):
    targets = AdapterTargets(language=("*",))
    return adapted_run(data, tmp_path_factory.mktemp("text"), targets, parts=("language",))


def outputs(folder, config, *, base=None):
    """What a checkpoint computes in float32, with adapters when `base` is given."""
    with torch.no_grad():
        if base is None:
            with single_process_model(config.model, torch.float32) as model:
                sealed.load(find_checkpoint(folder), model=model)
                return compute(model.eval(), config.model, make_probe(config.model))
        with merging.adapted_model(folder, config, torch.float32, base) as model:
            return compute(model, config.model, make_probe(config.model))


def test_merged_weights_give_the_adapters_logits(whole, tmp_path):
    folder, config = whole
    made = merge_checkpoint(folder, tmp_path / "merged")
    checkpoint = find_checkpoint(folder)
    with_adapters = outputs(checkpoint, config, base=base_of(checkpoint))
    merged, base = outputs(tmp_path / "merged", config), outputs(base_of(checkpoint), config)
    for name in ("text_logits", "mixed_logits"):
        assert (merged[name] - with_adapters[name]).abs().max() <= 1e-5 * with_adapters[name].abs().max()
        assert (merged[name] - base[name]).abs().max() > 0.05, "the adapters do nothing: the comparison shows nothing"
    assert made["largest_difference"] <= 1e-5
    assert made["layers"] == 4 + 2 + 3 * 2  # a tower block, the projector, M*-
    state = json.loads((find_checkpoint(tmp_path / "merged") / "state.json").read_text())
    assert state["facts"]["merged"] == {key: made[key] for key in ("layers", "largest_difference")}


def test_a_wrong_merge_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "merged_weight", lambda weight, a, b, scale: weight.float() + b @ a)  # no scale
    with pytest.raises(ConversionError, match="something else than the adapter"):
        merge_checkpoint(whole[0], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_logits_are_those_of_the_tensors_that_are_written(whole, tmp_path, monkeypatch):
    """Rows that leave the checkpoint in the wrong order: each layer by itself agrees with the pair that was read."""
    pair = merging._pair
    monkeypatch.setattr(merging, "_pair", lambda *args: (pair(*args)[0], pair(*args)[1].flip(0)))
    with pytest.raises(ConversionError, match="other logits than the adapters"):
        export_merged(whole[0], tmp_path / "hf", logits=True)
    assert list(tmp_path.iterdir()) == []


def rewritten(whole, root, change):
    """A copy of the run whose adapters' config was changed after the checkpoint; the stage with the adapters."""
    folder, config = whole
    shutil.copytree(folder.parent, root / "run")
    stage = root / "run/adapters"
    (stage / "config.yaml").write_text(dump_yaml(replace(config, adapter=change(config.adapter))))
    return stage


def without(monkeypatch, key):
    """States of checkpoints as a version wrote them that did not know a field; the real ones are sealed."""
    monkeypatch.setattr(base_module, "_state", lambda f: json.loads((f / "state.json").read_text()) | {key: None})


def test_a_config_that_was_rewritten_since_is_refused(whole, tmp_path):
    fewer = rewritten(whole, tmp_path, lambda old: replace(old, alpha=32.0))
    with pytest.raises(ConversionError, match=r"saved with adapter.alpha=16.0; .*config.yaml says adapter.alpha=32.0"):
        merge_checkpoint(fewer, tmp_path / "merged")
    with pytest.raises(ConversionError, match="write the former back"):
        export_adapters(fewer, tmp_path / "peft")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_no_adapter_of_a_checkpoint_is_left_out(whole, tmp_path, monkeypatch):
    """Also where the state is of a version that does not say which there are."""

    def fewer(old):
        return replace(old, targets=replace(old.targets, language=("in_proj",)))

    stage = rewritten(whole, tmp_path, fewer)
    without(monkeypatch, "adapter")
    with pytest.raises(ConversionError, match=r"has language_model.*linear_fc1.adapter.lora_a, which .* not name"):
        merge_checkpoint(stage, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("key", ["parent", "parent_seal"])
def test_a_state_that_does_not_name_its_base_says_so(whole, tmp_path, monkeypatch, key):
    base = base_of(find_checkpoint(whole[0]))
    without(monkeypatch, key)
    with pytest.raises(ConversionError, match=f"state.json has no {key}, so no checkpoint"):
        merge_checkpoint(whole[0], tmp_path / "merged", base=base)


def test_a_continued_export_of_merged_weights_is_the_same_folder(whole, tmp_path, monkeypatch):
    export = partial(adapters_out.export_canonical, max_shard_bytes=20_000)
    monkeypatch.setattr(adapters_out, "export_canonical", export)
    once = export_merged(whole[0], tmp_path / "once")
    shards = sorted(path.name for path in once.glob("*.safetensors"))
    card = (once / "README.md").read_text()
    assert '"layers": 12' in card
    largest = float(re.search('"largest_difference": ([0-9.e-]+)', card).group(1))
    assert 0 < largest <= 1e-5
    write = hf_export.write_shard

    def cut_off(path, *args):
        if path.name == shards[-1]:
            raise KeyboardInterrupt
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(hf_export, "write_shard", cut_off)
        with pytest.raises(KeyboardInterrupt):
            export_merged(whole[0], tmp_path / "again")
    written = []
    monkeypatch.setattr(hf_export, "write_shard", lambda path, *args: written.append(path.name) or write(path, *args))
    export_merged(whole[0], tmp_path / "again")
    assert written == shards[-1:]
    names = sorted(path.name for path in once.iterdir() if path.is_file())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir() if path.is_file())
    assert all((once / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_shards_of_other_adapter_options_are_not_kept(whole, tmp_path, monkeypatch):
    """The seals are the same where only the config was rewritten, and the state of an older version does not tell."""
    one, again = (merging.open_merged(whole[0]).identity for _ in range(2))
    assert one == again
    older = rewritten(whole, tmp_path, lambda old: replace(old, alpha=32.0))
    without(monkeypatch, "adapter")
    assert merging.open_merged(older).identity != one


def test_a_merge_never_holds_the_model(whole, tmp_path, monkeypatch):
    reading = Watched(monkeypatch, StoredTensors)
    merge_checkpoint(whole[0], tmp_path / "merged")
    sizes = [spec.nbytes for spec in StoredTensors(find_checkpoint(tmp_path / "merged")).specs.values()]
    assert reading.total >= sum(sizes)
    # A layer's pieces and their pair, beside the one before.
    assert reading.peak <= 1.5 * max(sizes) < sum(sizes) / 2


@pytest.mark.slow
def test_a_merged_run_is_exported_and_verified(whole, tmp_path):
    merge_checkpoint(whole[0], tmp_path / "merged")
    export_checkpoint(tmp_path / "merged", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert '"rank": 4' in card
    assert "largest_difference" in card
    assert verify(tmp_path / "hf", reference=tmp_path / "merged")["ok"]
    export_merged(whole[0], tmp_path / "at_once")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "at_once")]
    assert files[0] == files[1]
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "hf", "at_once"}


def test_a_moved_base_is_named(whole, tmp_path):
    folder, _ = whole
    run = tmp_path / "run"
    shutil.copytree(folder.parent, run)
    base = run / "train"
    base.rename(run / "elsewhere")
    shutil.copytree(run / "adapters", run / "copy")
    state = next((run / "copy/checkpoints").glob("*3/state.json"))
    raw = json.loads(state.read_text())
    raw["parent"] = str(base / "checkpoints/step_00000001")
    state.write_text(json.dumps(raw))
    with pytest.raises(ConversionError, match="not at"):
        merge_checkpoint(run / "adapters", tmp_path / "none", base=base / "checkpoints/step_00000001")
    made = merge_checkpoint(run / "adapters", tmp_path / "out", base=run / "elsewhere/checkpoints/step_00000001")
    assert made["largest_difference"] <= 1e-5


def test_a_run_that_was_moved_as_a_whole_finds_its_base(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder.parent, tmp_path / "run")
    moved = tmp_path / "run/adapters"
    state = find_checkpoint(moved) / "state.json"
    found = parent_of(state.parent)
    assert found is not None
    raw = json.loads(state.read_text())
    raw["parent"] = raw["parent"].replace(str(folder.parent), "/gone")
    state.write_text(json.dumps(raw))
    assert parent_of(state.parent) == tmp_path / "run/train/checkpoints" / found.name
    marker = tmp_path / "run/train/checkpoints" / found.name / "COMPLETE"
    marker.write_text("another seal")
    assert parent_of(state.parent) is None


def test_a_copied_checkpoint_of_adapters_is_no_whole_model(whole, tmp_path):
    copied = shutil.copytree(find_checkpoint(whole[0]), tmp_path / "copied/checkpoints/step_00000003")
    with pytest.raises(ConversionError, match="holds adapters alone"):
        export_checkpoint(copied, tmp_path / "out")
    with pytest.raises(ConversionError, match="moved out of its stage"):
        merge_checkpoint(copied, tmp_path / "out")
    with pytest.raises(CheckpointError, match="nemovl convert merge"):
        refuse_adapters(copied)


@pytest.mark.slow
def test_what_the_import_behind_the_base_carried_is_kept(data, tmp_path):
    """Constants, documents, Python files, the name: also where the base is named because it was moved."""
    config = tiny_runs.run_config(data, tmp_path, sources=("text",), steps=1)
    trainer.run(config)
    hf = export_checkpoint(StageFolder.of(config).path, tmp_path / "hf")
    (hf / "nemovl_export.json").unlink()
    (hf / "modeling.py").write_text("raise SystemExit\n")
    document = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(document | {"our_engine_wants": 3, "use_thumbnail": False}))
    weights = load_file(hf / "model.safetensors")
    weights["vision_model.radio_model.input_conditioner.norm_mean"] += 0.001
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(hf, tmp_path / "imported")
    folder, _ = adapted_run(data, tmp_path / "runs", AdapterTargets(language=("in_proj",)), base=tmp_path / "imported")
    (tmp_path / "imported").rename(tmp_path / "moved")
    base = find_checkpoint(tmp_path / "moved")
    with pytest.raises(ConversionError, match="not at"):
        export_merged(folder, tmp_path / "none")
    at_once = export_merged(folder, tmp_path / "at_once", base=base)
    merge_checkpoint(folder, tmp_path / "merged", base=base)
    shutil.rmtree(tmp_path / "moved")
    for out in (at_once, export_checkpoint(tmp_path / "merged", tmp_path / "after")):
        written = json.loads((out / "config.json").read_text())
        assert written["our_engine_wants"] == 3
        assert (out / "modeling.py").read_bytes() == (hf / "modeling.py").read_bytes()
        name = "vision_model.radio_model.input_conditioner.norm_mean"
        assert torch.equal(load_file(out / "model.safetensors")[name], weights[name])
        assert '"rank": 4' in (out / "README.md").read_text()
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("at_once", "after")]
    assert same[0] == same[1]
    state = json.loads((find_checkpoint(tmp_path / "merged") / "state.json").read_text())
    assert state["source"] == "hf"


def test_what_has_no_adapters_or_no_whole_model_says_so(whole, tmp_path):
    folder, _ = whole
    with pytest.raises(ConversionError, match="has no adapters"):
        merge_checkpoint(folder.parent / "train", tmp_path / "out")
    with pytest.raises(ConversionError, match="nemovl convert merge"):
        export_checkpoint(folder, tmp_path / "out")


def test_a_bf16_run_is_merged_in_float32(data, tmp_path):
    folder, _ = adapted_run(data, tmp_path, AdapterTargets(language=("*",)), params="bf16")
    made = merge_checkpoint(folder, tmp_path / "merged", logits=True)
    assert made["largest_difference"] <= 1e-5
    assert made["largest_logit_difference"] <= 1e-5 * made["largest_logit"]
    state = json.loads((find_checkpoint(tmp_path / "merged") / "state.json").read_text())
    assert state["dtype"] == "bfloat16"
    export_checkpoint(tmp_path / "merged", tmp_path / "hf")


def test_peft_on_transformers_own_model_computes_the_same(text, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import NemotronHForCausalLM

    # The library's guard is against a fused CUDA kernel; on a CPU the layer is called.
    monkeypatch.setattr("peft.tuners.tuners_utils._check_lora_target_modules_mamba", lambda *args: None)
    folder, config = text
    base = base_of(find_checkpoint(folder))
    export_checkpoint(base, tmp_path / "hf")
    made = export_adapters(folder, tmp_path / "peft")
    assert made["left_out"] == []
    assert made["layers"] == 8  # M*-: in, out; q, k, v, out; up, down
    native = NemotronHForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for layer in native.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    ids = make_probe(config.model).text[None]
    with torch.no_grad():
        alone = native(ids).logits[0]
        loaded = PeftModel.from_pretrained(native, tmp_path / "peft").eval()
        theirs = loaded(ids).logits[0]
    checkpoint = find_checkpoint(folder)
    ours = outputs(checkpoint, config, base=base)["text_logits"]
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()
    assert (alone - ours).abs().max() > 0.05, "the adapters do nothing: the comparison shows nothing"


def test_what_peft_refuses_is_said_at_export(text, tmp_path, caplog):
    from peft import PeftModel
    from transformers import NemotronHForCausalLM

    folder, _ = text
    export_checkpoint(base_of(find_checkpoint(folder)), tmp_path / "hf")
    export_adapters(folder, tmp_path / "peft")
    assert "peft opens no adapters on a Mamba layer's out_proj" in caplog.text
    native = NemotronHForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with pytest.raises(ValueError, match="out_proj"):
        PeftModel.from_pretrained(native, tmp_path / "peft")


def test_parts_that_a_peft_folder_cannot_hold_are_named(whole, tmp_path, caplog):
    made = export_adapters(whole[0], tmp_path / "peft")
    assert made["left_out"] == ["vision", "projector"]
    assert "--merge keeps it" in caplog.text
