"""Initial weights that do not depend on the layout: each is drawn whole from a generator keyed by its name, then cut.

Scales: normal(std) for matrices; projections back into the residual stream divided by the square root of the number of
residual additions (GPT-2); Mamba-2's own rules for A, dt and the convolution (arXiv 2405.21060 and its public code).
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

_RESIDUAL_OUTPUTS = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4
_A_MIN, _A_MAX = 1.0, 16.0


def init_weights(
    module: nn.Module,
    *,
    seed: int,
    std: float,
    prefix: str = "",
    residual_additions: int = 1,
    tp_size: int = 1,
    tp_rank: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Fills every parameter in place.

    Args:
        module: A part of the model; its parameters say how they are split (`partition_dim`, `partition_sizes`,
            `partition_stride`), as megatron-core's do.
        seed: Seed of the run.
        std: Standard deviation of matrices and embeddings.
        prefix: Name of the part in the whole model, with its dot: parameter names key the draws.
        residual_additions: Additions to the residual stream: layers of a hybrid stack, twice the layers of a ViT.
        tp_size: Size of the tensor parallel group of this part.
        tp_rank: This process's rank in it.
        device: Where values are drawn. They depend on it; a GPU is quick, a CPU gives the same everywhere.
    """
    for name, parameter in module.named_parameters():
        generator = torch.Generator(device).manual_seed(_key(seed, prefix + name))
        with torch.device(device):
            whole = _draw(name, full_shape(parameter, tp_size), std, residual_additions)(generator)
        with torch.no_grad():
            parameter.copy_(local_part(whole, parameter, tp_size, tp_rank))


def full_shape(parameter: Tensor, tp_size: int) -> list[int]:
    """Shape of a parameter before tensor parallelism splits it."""
    shape = list(parameter.shape)
    if _is_split(parameter, tp_size):
        shape[parameter.partition_dim] *= tp_size  # type: ignore[attr-defined]
    return shape


def local_part(whole: Tensor, parameter: Tensor, tp_size: int, tp_rank: int) -> Tensor:
    """The part of a whole tensor that a tensor parallel rank holds.

    Packed parameters (z, x, B, C, dt of a Mamba projection; gate and up of a SwiGLU) are split component by component.
    """
    if not _is_split(parameter, tp_size):
        return whole
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    sizes = component_sizes(parameter)
    parts = whole.split([size * tp_size for size in sizes], dim=dim)
    return torch.cat([p.narrow(dim, tp_rank * s, s) for p, s in zip(parts, sizes, strict=True)], dim=dim)


def join_parts(parts: list[Tensor], parameter: Tensor) -> Tensor:
    """The whole tensor from all ranks' parts, in rank order: the inverse of `local_part`."""
    if not _is_split(parameter, len(parts)):
        return parts[0]
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    pieces = zip(*(part.split(component_sizes(parameter), dim=dim) for part in parts), strict=True)
    return torch.cat([torch.cat(piece, dim=dim) for piece in pieces], dim=dim)


def component_sizes(parameter: Tensor) -> list[int]:
    """Local sizes of the components along the split dimension."""
    local = parameter.shape[parameter.partition_dim]  # type: ignore[attr-defined]
    stride = getattr(parameter, "partition_stride", 1)
    return getattr(parameter, "partition_sizes", [local // stride] * stride)


def _is_split(parameter: Tensor, tp_size: int) -> bool:
    return tp_size > 1 and getattr(parameter, "tensor_model_parallel", False)


def _key(seed: int, name: str) -> int:
    """A generator seed from the run's seed and a parameter's name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _draw(name: str, shape: list[int], std: float, residual_additions: int) -> Callable[[torch.Generator], Tensor]:
    """Picks the distribution of a parameter by its name: a function from a generator to a float32 tensor."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "A_log":
        return lambda g: _uniform(shape, _A_MIN, _A_MAX, g).log()
    if leaf == "dt_bias":
        return lambda g: _inverse_softplus(_uniform(shape, math.log(_DT_MIN), math.log(_DT_MAX), g).exp())
    if leaf in ("conv1d_weight", "conv1d_bias"):
        # The default of a PyTorch convolution with 4 inputs per output.
        bound = 1 / math.sqrt(4 if leaf == "conv1d_bias" else shape[-1])
        return lambda g: _uniform(shape, -bound, bound, g)
    if leaf == "D" or (leaf == "weight" and "norm" in owner.rpartition(".")[2]):
        return lambda g: torch.ones(shape)
    if leaf == "lora_a":
        # As published adapters start: what PyTorch gives a linear layer of this width.
        return lambda g: _uniform(shape, -(shape[-1] ** -0.5), shape[-1] ** -0.5, g)
    if leaf in ("bias", "lora_b"):
        return lambda g: torch.zeros(shape)
    if name.endswith(_RESIDUAL_OUTPUTS):
        std = std / math.sqrt(residual_additions)
    return lambda g: torch.randn(shape, generator=g) * std


def _uniform(shape: list[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _inverse_softplus(dt: Tensor) -> Tensor:
    dt = dt.clamp_min(_DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))
