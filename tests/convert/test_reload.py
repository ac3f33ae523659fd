"""Transformers' own classes open the folders, and their text models open here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.lazy import Spec
from nemovl_train.convert.reload_check import OPTIONS, main
from nemovl_train.convert.tensor_files import TensorFolder, read_json
from nemovl_train.convert.verify import expected_reports

from .tiny import CONFIG, random_tensors

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("kind", ["vlm", "language", "vision"])
def test_no_key_is_missing_or_unexpected_but_the_known(
    kind: str, values: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Audit hooks outlive a test, so this run does without; `verify` runs with it, in a process of its own.
    monkeypatch.setattr("nemovl_train.convert.reload_check.refuse_code_from", lambda _: None)
    main(folders[kind], tmp_path, values=values)
    assert bool(load_file(tmp_path / "theirs.safetensors")) == values
    reports = read_json(tmp_path / "theirs.json")["reports"]
    for part, wanted in expected_reports(HFFolder(folders[kind])).items():
        assert reports[part] == {"mismatched_keys": [], "error_msgs": [], **wanted}
    if kind == "vlm":
        assert reports["vlm"]["missing_keys"] == [
            "vision_model.embeddings.video_patch_projection.weight",
            "vision_model.summary_idxs",
        ]
        assert reports["vlm"]["unexpected_keys"] == [
            "vision_model.input_conditioner.norm_mean",
            "vision_model.input_conditioner.norm_std",
        ]


def test_without_values_a_wrong_name_or_shape_is_seen(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemovl_train.convert.reload_check.refuse_code_from", lambda _: None)
    original = TensorFolder.__init__

    def other(self: TensorFolder, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.specs["backbone.layers.1.mixer.up_projection.weight"] = self.specs.pop(
            "backbone.layers.1.mixer.up_proj.weight"
        )
        self.specs["backbone.norm_f.weight"] = Spec((7,), torch.float32)

    monkeypatch.setattr(TensorFolder, "__init__", other)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        main(folders["language"], tmp_path, values=False)
    monkeypatch.setitem(OPTIONS, "ignore_mismatched_sizes", True)
    main(folders["language"], tmp_path, values=False)
    report = read_json(tmp_path / "theirs.json")["reports"]["language"]
    assert report["missing_keys"] == ["model.layers.1.mixer.up_proj.weight"]
    assert report["unexpected_keys"] == ["model.layers.1.mixer.up_projection.weight"]
    assert "norm_f" in report["mismatched_keys"][0]


def test_auto_classes_open_the_parts(folders: dict[str, Path]) -> None:
    language = transformers.AutoModelForCausalLM.from_pretrained(folders["language"], local_files_only=True)
    assert type(language).__name__ == "NemotronHForCausalLM"
    vision = transformers.AutoModel.from_pretrained(folders["vision"], local_files_only=True)
    assert type(vision).__name__ == "RadioModel"
    config = transformers.AutoConfig.from_pretrained(folders["vlm"] / "transformers_omni", local_files_only=True)
    assert type(config).__name__ == "NemotronH_Omni_Reasoning_V3_Config"
    assert config.audio_config is None


def test_what_save_pretrained_wrote_can_be_imported(folders: dict[str, Path], tmp_path: Path) -> None:
    """Transformers writes layer types instead of the pattern; the tensors are the same."""
    model = transformers.NemotronHForCausalLM.from_pretrained(folders["language"], local_files_only=True)
    model.save_pretrained(tmp_path)
    folder = HFFolder(tmp_path)
    assert folder.config.language.hybrid_pattern == CONFIG.language.hybrid_pattern
    expected = random_tensors(kind="language")
    found = dict(folder.tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
