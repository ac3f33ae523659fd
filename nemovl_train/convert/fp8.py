"""Linear layers of a language model in FP8 (E4M3), one scale for each row: how a folder holds them.

A weight `X.weight` becomes `X.weight` in FP8 and `X.weight_scale` [rows, 1]; the layer's value is their product. The
scale takes a row's largest value to 448, FP8's largest, and is rounded to the folder's own format first, so that every
reader multiplies by the same number. Activations are quantised by whoever serves, a scale for each token: nothing has
to be calibrated. `quantization_config` says all of it in the words of the compressed-tensors library, which vLLM,
SGLang and Transformers read.

Embedding, head, norms, convolutions, A_log, D and dt_bias, tower and projector stay as they are, and so do the layers
at both ends that a run in FP8 kept in bfloat16.

Folders of other authors may have one scale for a whole weight, and scales of activations (NVIDIA ModelOpt): those are
read too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nemovl_train.config.adapters import linears
from nemovl_train.config.precision import inner_layers
from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.names import table
from nemovl_train.exceptions import ConversionError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
CONFIG_KEY = "quantization_config"
_WEIGHT, _SCALE, _ACTIVATION_SCALE = ".weight", ".weight_scale", ".input_scale"
# Names as engines have them, whatever prefix they put in front. A Mamba layer's convolution is a linear layer in vLLM.
_IGNORED = ("re:.*lm_head$", "re:.*conv1d$", "re:.*vision_model[.].*", "re:.*mlp1[.].*", "re:.*multi_modal_projector.*")


def scale_name(weight: str) -> str:
    """Name of the scales that belong to a weight."""
    return weight.removesuffix(_WEIGHT) + _SCALE


def activation_scale_name(weight: str) -> str:
    """Name of the scale of a layer's inputs, which folders of other authors may have."""
    return weight.removesuffix(_WEIGHT) + _ACTIVATION_SCALE


def is_scale(name: str) -> bool:
    """Whether a folder's tensor is a scale, of a weight or of activations, and no parameter."""
    return name.endswith((_SCALE, _ACTIVATION_SCALE))


def linear_weights(config: ModelConfig, kind: str, *, ends: int = 0) -> list[str]:
    """Names in a folder of the weights of the language model's linear layers.

    Args:
        config: Sizes of the model.
        kind: `vlm` or `language`.
        ends: Layers of the pattern at each end that are left out.

    Raises:
        ConversionError: There is no language model, or all of its layers are left out.
    """
    if kind == "vision":
        raise ConversionError("FP8 is for the linear layers of a language model, and a tower has none; leave out --fp8")
    places = inner_layers(config.language.num_layers, ends)
    ours = {
        f"language_model.{linear.name}{_WEIGHT}"
        for linear in linears(config)
        if linear.part == "language" and int(linear.name.split(".")[2]) in places
    }
    if not ours:
        raise ConversionError(
            f"the run kept all language layers in bf16 (precision.bf16_layers={ends}); leave out --fp8"
        )
    return [name for entry in table(config, kind) if entry.ours in ours for name in entry.hf]


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP8 values [rows, columns] and scales [rows, 1] of a weight.

    Args:
        weight: [rows, columns], finite.
        dtype: Format of the scales.

    Raises:
        ConversionError: A value is not finite.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise ConversionError("it has values that are not finite")
    # A row of zeros may have any scale.
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).to(dtype)
    scale = torch.where(scale > 0, scale, torch.finfo(dtype).tiny)
    return (wide / scale.float()).clamp(-LARGEST, LARGEST).to(FP8), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that FP8 values and scales (one a row, or one) stand for."""
    return (values.float() * scale.float()).to(dtype)


def quantized(tensors: Tensors, weights: Collection[str], dtype: torch.dtype) -> Tensors:
    """A folder's tensors with some weights in FP8, each followed by its scales.

    Args:
        tensors: The folder's tensors by name.
        weights: Names of matrices among them.
        dtype: Format of the scales.
    """
    specs: dict[str, Spec] = {}
    weight_of = {scale_name(name): name for name in weights}
    for name, spec in tensors.specs.items():
        specs[name] = Spec(spec.shape, FP8) if name in weights else spec
        if name in weights:
            specs[scale_name(name)] = Spec((spec.shape[0], 1), dtype)

    def read(name: str) -> Tensor:
        weight = weight_of.get(name, name)
        if weight not in weights:
            return tensors.read(name)
        try:
            values, scale = quantize(tensors.read(weight), dtype)
        except ConversionError as error:
            raise ConversionError(f"{weight} cannot be written in FP8: {error}") from error
        return scale if name in weight_of else values

    return Tensors(specs, read)


def quantized_weights(specs: Mapping[str, Spec]) -> dict[str, str]:
    """FP8 weights of a folder and their scales, by name; a weight whose scale this module cannot use is left out."""
    found = {}
    for name, spec in specs.items():
        scale = specs.get(scale_name(name)) if name.endswith(_WEIGHT) else None
        if spec.dtype == FP8 and scale is not None and scale.shape in ((), (1,), (spec.shape[0], 1)):
            found[name] = scale_name(name)
    return found


def widest_format(specs: Mapping[str, Spec]) -> torch.dtype:
    """Format that most bytes beside FP8 weights have: what those are read as."""
    bytes_of: dict[torch.dtype, int] = {torch.float32: 0}
    for name, spec in specs.items():
        if spec.dtype.is_floating_point and spec.dtype.itemsize > 1 and not is_scale(name):
            bytes_of[spec.dtype] = bytes_of.get(spec.dtype, 0) + spec.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


def quantization_config(plain: Iterable[str] = ()) -> dict[str, Any]:
    """`quantization_config` of a folder's config: the scheme that compressed-tensors calls FP8_DYNAMIC.

    Args:
        plain: Weights of language layers that are not in FP8, by name.
    """
    # From `layers.` on: engines have names of their own for what holds the layers.
    layers = (name[name.index("layers.") :].removesuffix(_WEIGHT).replace(".", "[.]") for name in plain)
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": [*_IGNORED, *(f"re:.*{layer}$" for layer in layers)],
    }
