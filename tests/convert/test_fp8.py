"""FP8 folders: what is in FP8 and what is not, values by a decoder of our own, the way back, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemovl_train.convert.checkpoints import export_checkpoint, import_checkpoint
from nemovl_train.convert.fp8 import LARGEST, quantize
from nemovl_train.convert.hf_export import MANIFEST, export_canonical
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.tensor_files import SINGLE, TensorFolder, read_json
from nemovl_train.convert.verify import Check, _check_reference, verify
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors

LINEAR = re.compile(r"\.mixer\.((in|out|up|down)_proj|[qkvo]_proj)\.weight$")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """Folders in FP8 of the tensors that `folders` holds in float32."""
    root = tmp_path_factory.mktemp("fp8")
    return {
        kind: export_canonical(
            random_tensors(kind=kind), CONFIG, root / kind, kind=kind, tokenizer=tokenizer_dir, card={}, fp8=True
        )
        for kind in ("vlm", "language")
    }


def decoded(values: torch.Tensor) -> np.ndarray:
    """E4M3 by its definition: a sign, four bits of exponent (bias 7), three of mantissa; all ones is no number."""
    raw = values.view(torch.uint8).numpy().astype(np.int64)
    sign, exponent, mantissa = raw >> 7, raw >> 3 & 15, raw & 7
    assert not ((exponent == 15) & (mantissa == 7)).any()
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    return np.where(sign == 1, -1.0, 1.0) * np.where(exponent == 0, mantissa * 2.0**-9, normal)


@pytest.mark.parametrize("kind", ["vlm", "language"])
def test_linear_layers_of_the_language_model_alone_are_in_fp8(kind, fp8, folders):
    found, plain = load_file(fp8[kind] / SINGLE), load_file(folders[kind] / SINGLE)
    linear = {name for name in plain if LINEAR.search(name)}
    assert len(linear) == 3 * 2 + 3 * 2 + 4
    assert found.keys() == plain.keys() | {f"{name}_scale" for name in linear}
    for name, tensor in plain.items():
        if name not in linear:
            assert torch.equal(found[name], tensor), name
    errors = []
    for name in linear:
        values, scale, weight = found[name], found[f"{name}_scale"], plain[name].double().numpy()
        assert (values.dtype, values.shape) == (torch.float8_e4m3fn, plain[name].shape)
        assert (scale.dtype, list(scale.shape)) == (torch.float32, [len(weight), 1])
        step = scale.double().numpy()
        assert np.abs(decoded(values)).max(axis=1) == pytest.approx(LARGEST)
        error = np.abs(decoded(values) * step - weight)
        # Half of a step: of three bits of mantissa, or of the smallest number.
        assert (error <= np.maximum(np.abs(weight) * 2.0**-4, step * 2.0**-10) * (1 + 1e-6)).all(), name
        errors.append(error.max() / np.abs(weight).max())
        wrong = np.abs(decoded(values) * np.roll(step, 1) - weight)
        assert not (wrong <= np.maximum(np.abs(weight) * 2.0**-4, step * 2.0**-10)).all(), "any scale would pass"
    assert max(errors) > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("kind", ["vlm", "language"])
def test_the_config_names_the_layers_that_are_in_fp8(kind, fp8):
    """As compressed-tensors reads it: linear modules of Transformers' own class, but for the ignored ones."""
    from transformers import (
        NemotronH_Omni_Reasoning_V3,
        NemotronH_Omni_Reasoning_V3_Config,
        NemotronHConfig,
        NemotronHForCausalLM,
    )

    document = read_json(fp8[kind] / "config.json")
    scheme = document.pop("quantization_config")
    assert (scheme["quant_method"], scheme["format"]) == ("compressed-tensors", "float-quantized")
    (group,) = scheme["config_groups"].values()
    assert (group["targets"], group["weights"]["strategy"]) == (["Linear"], "channel")
    assert group["input_activations"]["dynamic"] is True
    with torch.device("meta"):
        if kind == "vlm":
            fields = read_json(fp8[kind] / "transformers_omni/config.json")
            assert fields.pop("quantization_config") == scheme
            model = NemotronH_Omni_Reasoning_V3(NemotronH_Omni_Reasoning_V3_Config(**fields))
        else:
            model = NemotronHForCausalLM(NemotronHConfig(**document))
    modules = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    patterns = [text.removeprefix("re:") for text in scheme["ignore"]]
    chosen = {name for name in modules if not any(re.match(pattern, name) for pattern in patterns)}
    specs = TensorFolder(fp8[kind]).stored
    held = {name.removesuffix(".weight") for name, spec in specs.items() if spec.dtype == torch.float8_e4m3fn}
    assert {re.sub(r"(^|language_model\.)model\.", r"\1backbone.", name) for name in chosen} == held
    assert modules != chosen


def test_layers_that_trained_in_bf16_stay_out_of_fp8(folders, tokenizer_dir, tmp_path):
    """A run in FP8 keeps the layers at both ends in bfloat16, and so does its folder."""
    out = export_canonical(
        random_tensors(), CONFIG, tmp_path / "x", kind="vlm", tokenizer=tokenizer_dir, card={}, fp8=True, bf16_layers=1
    )
    found, plain = load_file(out / SINGLE), load_file(folders["vlm"] / SINGLE)
    held = {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    last = len(CONFIG.language.hybrid_pattern) - 1
    ends = {n for n in plain if LINEAR.search(n) and re.search(rf"language_model\..*layers\.(0|{last})\.", n)}
    assert ends
    assert held == {name for name in plain if LINEAR.search(name)} - ends
    assert all(torch.equal(found[name], plain[name]) for name in ends)
    scheme = read_json(out / "config.json")["quantization_config"]
    patterns = [text.removeprefix("re:") for text in scheme["ignore"]]
    for name in (n for n in plain if LINEAR.search(n)):
        module = name.removesuffix(".weight").replace("backbone.", "model.")
        assert any(re.match(pattern, module) for pattern in patterns) == (name in ends), name
    assert "but for 1 at each end of the pattern" in (out / "README.md").read_text()
    with pytest.raises(ConversionError, match=r"precision.bf16_layers=9\); leave out --fp8"):
        export_canonical(
            random_tensors(), CONFIG, tmp_path / "y", kind="vlm", tokenizer=None, card={}, fp8=True, bf16_layers=9
        )


def test_a_folder_is_read_as_what_it_stands_for(fp8, folders, tmp_path, caplog):
    folder, plain = HFFolder(fp8["vlm"]), dict(HFFolder(folders["vlm"]).tensors())
    assert "FP8 weights are read as float32" in caplog.text
    raw = load_file(fp8["vlm"] / SINGLE)
    name = "language_model.backbone.layers.1.mixer.up_proj.weight"
    expected = decoded(raw[name]) * raw[f"{name}_scale"].double().numpy()
    tensors = dict(folder.tensors())
    assert tensors["language_model.decoder.layers.1.mlp.linear_fc1.weight"].double().numpy() == pytest.approx(expected)
    assert tensors.keys() == plain.keys()
    # Back in a plain format, the folder says nothing of FP8 any more.
    import_checkpoint(fp8["vlm"], tmp_path / "ours")
    again = export_checkpoint(tmp_path / "ours", tmp_path / "again")
    assert "quantization_config" not in read_json(again / "config.json")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in HFFolder(again).tensors())


def test_a_scale_for_a_whole_weight_is_read_as_well(fp8, tmp_path):
    """The layout of NVIDIA ModelOpt: one scale a weight, one for the layer's inputs."""
    folder = shutil.copytree(fp8["language"], tmp_path / "modelopt")
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / SINGLE)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = tensors[name].max()
        tensors[name.replace(".weight_scale", ".input_scale")] = torch.tensor(0.5)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    found = dict(HFFolder(folder).tensors())
    name = "backbone.layers.1.mixer.up_proj.weight"
    expected = decoded(tensors[name]) * float(tensors[f"{name}_scale"])
    assert found["language_model.decoder.layers.1.mlp.linear_fc1.weight"].double().numpy() == pytest.approx(expected)


def test_what_cannot_be_written_or_read_is_named(fp8, tmp_path):
    tensors = random_tensors(kind="vision")
    with pytest.raises(ConversionError, match="leave out --fp8"):
        export_canonical(tensors, CONFIG, tmp_path / "x", kind="vision", tokenizer=None, card={}, fp8=True)
    tensors = random_tensors(kind="language")
    tensors["language_model.decoder.layers.0.mixer.in_proj.weight"][3, 4] = float("inf")
    with pytest.raises(ConversionError, match=r"layers.0.mixer.in_proj.weight cannot be written in FP8.*not finite"):
        export_canonical(tensors, CONFIG, tmp_path / "x", kind="language", tokenizer=None, card={}, fp8=True)
    folder = shutil.copytree(fp8["language"], tmp_path / "damaged")
    (folder / MANIFEST).unlink()
    kept = load_file(folder / SINGLE)
    del kept["backbone.layers.1.mixer.up_proj.weight_scale"]
    save_file(kept, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers.1.mixer.up_proj.weight is float8_e4m3fn, expected float32"):
        HFFolder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_size_are_finite_and_scales_are_rounded_first(dtype):
    weight = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [3e4, 1.0], [0.3, -0.7]])
    values, scale = quantize(weight, dtype)
    assert scale.dtype == dtype
    product = torch.from_numpy(decoded(values)) * scale.double()
    assert product.isfinite().all()
    assert (product[0] == 0).all()
    # With a scale that were rounded afterwards, the largest value of a row would be off by its rounding.
    assert ((product[2:] - weight[2:]).abs() <= weight[2:].abs() * 2.0**-4 + scale[2:].double() * 2.0**-10).all()


def test_the_reference_check_sees_a_changed_value(fp8, folders, tmp_path):
    path = import_checkpoint(folders["language"], tmp_path / "ours")
    same = Check("reference")
    _check_reference(HFFolder(fp8["language"]), path, same)
    assert same.detail["FP8 weights equal bitwise to the reference's, quantised again"] == 16
    folder = shutil.copytree(fp8["language"], tmp_path / "changed")
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / SINGLE)
    name = "backbone.layers.3.mixer.v_proj.weight_scale"
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"v_proj.weight_scale is not what"):
        _check_reference(HFFolder(folder), path, same)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vlm", "language"])
def test_verification_compares_what_fp8_stands_for(kind, fp8, folders, tmp_path):
    path = import_checkpoint(folders[kind], tmp_path / "ours")
    shutil.copytree(fp8[kind], tmp_path / "x")
    card = verify(tmp_path / "x", reference=path)
    assert card["ok"], json.dumps(card["checks"], indent=1)
    assert card["largest_difference"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("ends", [0, 1])
def test_transformers_opens_it_with_compressed_tensors(ends, tokenizer_dir, tmp_path):
    pytest.importorskip("compressed_tensors", reason="Transformers reads FP8 folders with this package")
    from transformers import NemotronHForCausalLM

    from nemovl_train.convert.probe import make_probe
    from nemovl_train.convert.reload_check import release_time_step

    options = {"kind": "language", "tokenizer": tokenizer_dir, "card": {}, "fp8": True, "bf16_layers": ends}
    path = export_canonical(random_tensors(kind="language"), CONFIG, tmp_path / "x", **options)
    folder = HFFolder(path)
    state = {name: folder.files.read(name) for name in folder.files.specs}
    model = NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plain = NemotronHForCausalLM.from_pretrained(None, config=_plain(path), state_dict=state).eval()
    modules = dict(model.named_modules())
    for name in folder.files.fp8:
        module = modules[name.removesuffix(".weight").replace("backbone.", "model.", 1)]
        weight = module.weight.float() * getattr(module, "weight_scale", torch.ones(1)).float()
        assert torch.equal(weight, state[name]), name
    ids = make_probe(folder.config).text[None]
    for one in (model, plain):
        release_time_step(one)
    with torch.no_grad():
        found, expected = model(ids).logits, plain(ids).logits
    # It rounds activations to FP8 as well, which random weights do not forgive; a wrong scale would give noise.
    assert (found - expected).norm() <= 0.15 * expected.norm()


def _plain(folder: Path):
    from transformers import NemotronHConfig

    document = read_json(folder / "config.json")
    del document["quantization_config"]
    return NemotronHConfig(**document)
