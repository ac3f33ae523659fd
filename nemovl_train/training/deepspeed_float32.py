"""Parameters that stay float32 in a bfloat16 model (A_log and D of Mamba layers), kept out of DeepSpeed.

DeepSpeed casts every parameter of a bfloat16 model and flattens them into buffers of one dtype. These are few and
small, so every rank holds them whole, sums their gradients and takes the same AdamW step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemovl_train.config.schema import OptimConfig
from nemovl_train.parallel.layout import Layout

# isort: split
# The layout module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.dist_checkpointing import ShardedTensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class Float32Parameters:
    """Takes such parameters out of their modules' tables, so that only their own modules know them.

    Args:
        model: The model; its frozen parameters are marked.
        layout: Ranks and device.
        optim: Optimizer options.
        params_dtype: Dtype of all other parameters.
    """

    def __init__(self, model: nn.Module, layout: Layout, optim: OptimConfig, params_dtype: torch.dtype) -> None:
        self.layout = layout
        found = {name: p for name, p in model.named_parameters() if p.dtype != params_dtype}
        for name, parameter in found.items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            del module._parameters[attribute]
            module.__dict__[attribute] = parameter  # an ordinary attribute: forward and autograd see no difference
        self.trained = {name: p for name, p in found.items() if p.requires_grad}
        assert all(p.dim() == 1 for p in self.trained.values()), "vectors, which do not decay"
        self.adam = (
            torch.optim.AdamW(
                list(self.trained.values()), betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0.0
            )
            if self.trained
            else None
        )
        self._norm = 0.0

    def sum_gradients(self) -> None:
        """Sum over ranks, undo the factor that DeepSpeed's average needs, and take the norm. Collective."""
        if not self.trained:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained.values()]
        flat = torch.cat(gradients)
        dist.all_reduce(flat)
        flat /= self.layout.dp
        for parameter, gradient in zip(self.trained.values(), flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = gradient
        self._norm = float(torch.linalg.vector_norm(flat))

    def norm(self) -> float:
        """Of the summed gradients; infinite where it is not a number."""
        return self._norm if math.isfinite(self._norm) else math.inf

    def step(self, lr: float, scale: float) -> None:
        """AdamW with gradients times `scale`, then no gradients."""
        if self.adam is None:
            return
        for parameter in self.trained.values():
            assert parameter.grad is not None
            parameter.grad.mul_(scale)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()

    def zero_grad_if(self, dropped: bool) -> None:
        """Drop gradients where the step was."""
        if dropped and self.adam is not None:
            self.adam.zero_grad()
            self._norm = 0.0

    def sharded(self, steps: int) -> dict[str, Any]:
        """Moments by parameter; the weights are among the model's. One rank's copy is saved."""
        entries = {}
        for name, parameter in self.trained.items():
            state = self._state(parameter, steps)
            for moment in MOMENTS:
                key = f"optimizer.float32.{moment}.{name}"
                entries[key] = ShardedTensor.from_rank_offsets(key, state[moment], replica_id=self.layout.rank)
        return entries

    def restore(self, loaded: dict[str, torch.Tensor], steps: int) -> None:
        """Take over moments and the number of steps that made them."""
        for name, parameter in self.trained.items():
            state = self._state(parameter, steps)
            state["step"] = torch.tensor(float(steps))
            for moment in MOMENTS:
                state[moment].copy_(loaded[f"optimizer.float32.{moment}.{name}"])

    def _state(self, parameter: nn.Parameter, steps: int) -> dict[str, torch.Tensor]:
        """AdamW's state of a parameter, made where its first step is still to come."""
        assert self.adam is not None
        state = self.adam.state[parameter]
        if not state:
            state["step"] = torch.tensor(float(steps))
            state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        return state
