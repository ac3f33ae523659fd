"""Which leaf modules the model is built from: one provider per backend, the same parameter names in both.

`torch` runs on any device. `te` takes Transformer Engine's norms, linears and attention (CUDA). Norms are never fused
into linears, so that a checkpoint of one backend loads in the other.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemovl_train.exceptions import UserError
from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from nemovl_train.model.attention import TorchAttention  # noqa: E402
from nemovl_train.model.fp8 import Context  # noqa: E402

BACKENDS = ("torch", "te", "auto")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Formats of the parameters, by their names in configs."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Leaf modules, each with the call signature megatron-core's layers use.

    Attributes:
        norm: Builds `(config=, hidden_size=, eps=)`; RMSNorm or LayerNorm as `config.normalization` says.
        column_linear: Linear whose rows are split over tensor parallel ranks.
        row_linear: Linear whose columns are split.
        core_attention: Attention of packs (causal in every document) and of batches of equal tiles (no mask).
        fp8: Makes the context in which its linears multiply in block-wise FP8; raises a UserError on a GPU that cannot.
            None where they cannot anywhere.
    """

    name: str
    norm: Any
    column_linear: Any
    row_linear: Any
    core_attention: Any
    fp8: Callable[[], Context] | None = None

    def fp8_context(self) -> Context:
        """Context factory for `fp8.multiply_in_fp8`.

        Raises:
            UserError: This backend, or this machine, cannot multiply in FP8.
        """
        if self.fp8 is None:
            raise UserError(
                f"precision.fp8=blockwise: the backend {self.name} cannot multiply in FP8 (precision.backend=te on a "
                "Hopper GPU or newer can); set precision.fp8=none"
            )
        return self.fp8()


class TorchRMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension; its weight takes part in the sequence parallel gradient sum."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchLayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, likewise."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """The plain norm that `config.normalization` names. megatron-core's own refuses sequence parallelism."""
    norm = {"RMSNorm": TorchRMSNorm, "LayerNorm": TorchLayerNorm}[config.normalization]
    return norm(config, hidden_size, eps)


TORCH = Backend(
    name="torch",
    norm=torch_norm,
    column_linear=ColumnParallelLinear,
    row_linear=RowParallelLinear,
    core_attention=TorchAttention,
)


def select_backend(name: str) -> Backend:
    """Picks a backend.

    Args:
        name: `torch`, `te`, or `auto`: `te` when CUDA and Transformer Engine are there, else `torch`.

    Raises:
        UserError: An unknown name, or `te` where it cannot run.
    """
    if name not in BACKENDS:
        raise UserError(f"precision.backend={name!r} is none of {', '.join(BACKENDS)}; set precision.backend=auto")
    if name == "auto":
        name = "te" if _missing_for_te() is None else "torch"
    if name == "torch":
        return TORCH
    missing = _missing_for_te()
    if missing is not None:
        raise UserError(f"precision.backend=te needs {missing}; set precision.backend=torch")
    from nemovl_train.model.backend_te import TE

    return TE


def _missing_for_te() -> str | None:
    """What keeps the `te` backend from running here, as an end of a sentence; None when nothing does."""
    if not torch.cuda.is_available():
        return "a CUDA device, and none is visible"
    for package, extra in (("transformer_engine", "Transformer Engine"), ("mamba_ssm", "mamba-ssm")):
        if importlib.util.find_spec(package) is None:
            return f"{extra}, which is not installed (pip install 'nemovl[gpu]')"
    return None
