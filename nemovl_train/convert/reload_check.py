"""Opens a folder with Transformers' own classes and records what they report and compute.

Run by `verify` in a process of its own, without network: `python -m nemovl_train.convert.reload_check FOLDER OUT`, and
`keys` behind it for names and shapes alone. Writes OUT/theirs.safetensors (float32) and OUT/theirs.json. Nothing of our
model is imported here.

Shape legend: S tokens, V vocabulary rows, T tiles, G patches along a tile's side, E tower width, P patch side.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# ruff: noqa: E402
# With a CPU build of torch, importing torchvision fails, and Transformers imports it wherever it is installed.
sys.modules["torchvision"] = None  # type: ignore[assignment]

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronHConfig,
    NemotronHForCausalLM,
    RadioConfig,
    RadioModel,
)

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert import hf_layout
from nemovl_train.convert.fp8 import CONFIG_KEY
from nemovl_train.convert.guard import refuse_code_from
from nemovl_train.convert.hf_config import OMNI_FOLDER, read_config, read_kind
from nemovl_train.convert.names import is_llama
from nemovl_train.convert.probe import Probe, make_probe
from nemovl_train.convert.tensor_files import TensorFolder, read_json

KEYS_ALONE = "keys"
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}


def main(hf_dir: Path, out: Path, *, values: bool = True) -> None:
    """Load, compute, write.

    Args:
        hf_dir: The folder.
        out: Existing folder for the results.
        values: Load weights and compute with them; without, classes load tensors of the right shapes that have no
            values, which takes no memory and tells as much about names and shapes.
    """
    refuse_code_from(hf_dir)
    torch.manual_seed(0)
    folder = _Folder(hf_dir, values=values)
    probe = make_probe(folder.config)
    outputs: dict[str, Tensor] = {}
    reports: dict[str, Any] = {}
    with torch.no_grad():
        if folder.kind != "vision":
            model, reports["language"] = _text_model(folder)
            if values:
                outputs["text_logits"] = model(input_ids=probe.text[None], use_cache=False).logits[0]
            del model
        if folder.kind != "language":
            model, reports["vision"] = _tower(folder)
            if values:
                # It normalises pixels itself.
                outputs["tower_features"] = model(probe.tiles.float() / 255.0).features
            del model
        if folder.kind == "vlm" and not is_llama(folder.config.language):
            model, reports["vlm"] = _omni(folder)
            outputs |= _whole(model, folder.config, probe) if values else {}
        elif folder.kind == "vlm" and values:
            outputs |= _composed(folder, outputs["tower_features"], probe)
    save_file({n: t.float().contiguous() for n, t in outputs.items()}, str(out / "theirs.safetensors"))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (out / "theirs.json").write_text(json.dumps({"reports": reports, "versions": versions}), encoding="utf-8")


class _Folder:
    """The folder under test, and how its weights get into a class.

    Args:
        hf_dir: The folder.
        values: As for `main`.
    """

    def __init__(self, hf_dir: Path, *, values: bool) -> None:
        self.path, self.values = hf_dir, values
        self.files = TensorFolder(hf_dir)
        self.kind, self.config = read_kind(hf_dir), read_config(hf_dir, tensors=self.files)

    def load(self, of_model: Any, settings: Any, prefix: str, *, whole: bool) -> tuple[Any, dict[str, Any]]:
        """A model and what its class reports.

        Args:
            of_model: The class.
            settings: Its config; None where the folder's own is tried as well.
            prefix: Prefix of its tensors.
            whole: The class opens the folder itself, where that can be. FP8 weights are handed over as what they stand
                for: the class would need one more package for them.
        """
        if whole and self.values and not self.files.fp8:
            model, info = of_model.from_pretrained(self.path, **({"config": settings} if settings else {}), **OPTIONS)
        else:
            settings = settings or of_model.config_class(**_unquantized(read_json(self.path / "config.json")))
            names = {n.removeprefix(prefix): n for n in self.files.specs if n.startswith(prefix)}
            read = self.files.read if self.values else lambda name: self.files.specs[name].meta()
            options = OPTIONS if self.values else {**OPTIONS, "device_map": "meta"}
            state = {short: read(name) for short, name in names.items()}
            model, info = of_model.from_pretrained(None, config=settings, state_dict=state, **options)
        return model.eval(), _report(info)


def _text_model(folder: _Folder) -> tuple[Any, dict[str, Any]]:
    document = read_json(folder.path / "config.json")
    alone = folder.kind == "language"
    llm = document if alone else document.get("llm_config") or document["text_config"]
    llama = llm.get("model_type") == "llama"
    of_config, of_model = (LlamaConfig, LlamaForCausalLM) if llama else (NemotronHConfig, NemotronHForCausalLM)
    settings = None if alone else of_config(**_unquantized(llm))
    model, info = folder.load(of_model, settings, "" if alone else "language_model.", whole=alone)
    release_time_step(model)
    return model, info


def _tower(folder: _Folder) -> tuple[Any, dict[str, Any]]:
    native = folder.kind == "vision" and read_json(folder.path / "config.json").get("model_type") == "radio"
    settings = None if native else RadioConfig(**hf_layout.native_vision_config(folder.config.vision, dtype="float32"))
    return folder.load(RadioModel, settings, "vision_model." if folder.kind == "vlm" else "", whole=native)


def _omni(folder: _Folder) -> tuple[Any, dict[str, Any]]:
    written = folder.path / OMNI_FOLDER / "config.json"
    fields = read_json(written) if written.is_file() else hf_layout.omni_config(folder.config, dtype="float32")
    settings = NemotronH_Omni_Reasoning_V3_Config(**_unquantized(fields))
    model, info = folder.load(NemotronH_Omni_Reasoning_V3, settings, "", whole=True)
    release_time_step(model)
    # The class casts pixels to this format, and has none when it was built from a config.
    model.vision_model.config.dtype = torch.float32
    return model, info


def _whole(model: Any, config: ModelConfig, probe: Probe) -> dict[str, Tensor]:
    """Logits [S, V] of text and tiles, and the projected visual tokens, by the native Omni class."""
    patches, grids = _patches(config, probe.tiles)
    tokens = model.get_image_features(patches, grids, return_dict=True).pooler_output
    logits = model(input_ids=probe.mixed[None], pixel_values=patches, image_grid_hw=grids, use_cache=False).logits[0]
    return {"visual_tokens": torch.stack(tuple(tokens)), "mixed_logits": logits}


def _composed(folder: _Folder, features: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Logits and visual tokens of the predecessor, for which Transformers has no class: its parts, put together here.

    Pixel shuffle and projector follow the public readers of its folder (vLLM `nemotron_vl.py`).
    """
    count, side, width = features.shape[0], math.isqrt(features.shape[1]), features.shape[2]
    # Two by two neighbours become one token: (row, column, channel) inside, tokens row by row.
    grid = features.view(count, side // 2, 2, side // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
    joined = grid.reshape(count, -1, 4 * width)
    files = folder.files
    weight = {n.removeprefix("mlp1."): files.read(n).float() for n in files.specs if n.startswith("mlp1.")}
    hidden = F.layer_norm(joined, (4 * width,), weight["0.weight"], weight["0.bias"], hf_layout.PROJECTOR_EPS)
    hidden = F.gelu(F.linear(hidden, weight["1.weight"], weight["1.bias"]))
    tokens = F.linear(hidden, weight["3.weight"], weight["3.bias"])
    model, _ = _text_model(folder)
    embeddings = model.get_input_embeddings()(probe.mixed)
    embeddings[probe.mixed == folder.config.tokens.image] = tokens.flatten(0, 1)
    logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    return {"visual_tokens": tokens, "mixed_logits": logits}


def release_time_step(model: torch.nn.Module) -> None:
    """Take away the lower clamp of the time step: the class clamps at `time_step_min`, which training never did."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            setattr(module, "time_step_limit", (0.0, float("inf")))  # noqa: B010 (not a tensor)


def _patches(config: ModelConfig, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised patches [T * G * G, 3 * P * P], channels first inside a patch, and grids [T, 2]."""
    mean, std = torch.tensor(config.vision.norm_mean), torch.tensor(config.vision.norm_std)
    pixels = (tiles.float() / 255.0 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    side, grid = config.vision.patch_size, config.vision.tile_size // config.vision.patch_size
    cut = pixels.unfold(2, side, side).unfold(3, side, side)  # [T, 3, G, G, P, P]
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * side * side), torch.full((tiles.shape[0], 2), grid)


def _unquantized(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != CONFIG_KEY}


def _report(info: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    return {key: sorted(str(v) for v in values) for key, values in info.items() if not isinstance(values, str)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), values=sys.argv[3:] != [KEYS_ALONE])
