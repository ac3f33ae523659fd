"""What the layers make again in backward instead of keeping it.

`selective` drops outputs that are cheap to make again and that only a following linear keeps: of norms, of the
activation, of a Mamba layer's gated norm. The tensor's memory is given back once that linear has read it, and is filled
again when the gradient reaches the linear. Nothing runs twice but these. Mamba layers convolve again in either case.

`full` keeps a layer's input alone and runs the layer again; `offload` does, and keeps the input in host memory.

An output that can be made again carries a function that does it, `remake(into)`. Modules are told by forward hooks, so
that the layers themselves, megatron-core's among them, know nothing of it.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nemovl_train.model.fp8 import in_fp8
from nemovl_train.model.offload import Host
from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.transformer.mlp import MLP  # noqa: E402

Remake = Callable[[Tensor], object]

_NORMS = ("norm", "input_layernorm", "pre_mlp_layernorm")
_READERS = ("in_proj", "out_proj", "linear_qkv", "linear_fc1", "linear_fc2")
"""Linears that are the only readers of their input."""


def can_be_remade(output: Tensor, remake: Remake) -> Tensor:
    """Marks a tensor: `remake(into)` writes the same values into a tensor of its shape. Returns the tensor."""
    output.remake = remake  # type: ignore[attr-defined]
    return output


class Activation:
    """An activation function whose output can be made again from its input.

    Args:
        function: Elementwise; its backward keeps the input alone.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        """Applies the function."""
        kept = x.detach()
        return can_be_remade(self._function(x), lambda into: into.copy_(self._function(kept)))


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 that keeps x alone, in two operations forward and three backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(grad).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2. megatron-core's own is compiled at first use, which needs a C++ compiler and seconds on a CPU."""
    return _SquaredReLU.apply(x)


def recompute_selectively(part: nn.Module) -> None:
    """Makes a built part drop and remake outputs of norms and activations; see the module's text.

    Args:
        part: The language model or the tower.
    """
    for name, module in part.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in _NORMS and not name.endswith("mixer.norm"):
            module.register_forward_hook(_mark)
        elif leaf in _READERS:
            module.register_forward_hook(_drop_input)
        if isinstance(module, MLP) and not module.config.gated_linear_unit:
            module.activation_func = Activation(module.activation_func)
        if hasattr(module, "remakes_gated_norm"):
            module.remakes_gated_norm = True


def recompute_fully(layers: Iterable[nn.Module], host: Host | None = None) -> None:
    """Makes layers keep their input alone and run again in backward.

    megatron-core's own is not taken: it needs an input with a gradient, which the first layers of a model whose
    embedding is frozen do not have.

    Args:
        layers: Layers of a built part.
        host: Where they keep it; on the device when None.
    """
    for layer in layers:
        layer.forward = partial(_run_again, layer.forward, host)


def _run_again(forward: Callable[..., Any], host: Host | None, /, *args: Any, **kwargs: Any) -> Any:
    # Only positional arguments are saved as tensors of the graph; keywords would be held as they are.
    if "hidden_states" in kwargs:
        return _run_again(partial(_with_hidden, forward), host, kwargs.pop("hidden_states"), *args, **kwargs)
    with host.hooks() if host is not None else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _with_hidden(forward: Callable[..., Any], hidden_states: Tensor, /, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, hidden_states=hidden_states, **kwargs)


def _mark(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    kept = inputs[0].detach()
    can_be_remade(output, lambda into: into.copy_(norm.forward(kept)))


def _keeps_input(linear: nn.Module) -> bool:
    """Whether the input would stay for backward: for the weight's gradient, unless in FP8, or for an adapter's.

    What nobody keeps goes by itself; filling it again would be work for nothing.
    """
    weight_reads = linear.weight.requires_grad and not in_fp8(linear)
    return weight_reads or any(p.requires_grad for name, p in linear.named_parameters() if "." in name)


def _drop_input(linear: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> None:
    """Gives an input's memory back after the linear has read it, to be filled when the linear's gradient comes."""
    remake = getattr(inputs[0], "remake", None)
    if remake is None:
        return
    delattr(inputs[0], "remake")
    if not outputs[0].requires_grad or not _keeps_input(linear):
        return
    # `data` counts changes of its own: the values will be what they were, and autograd need not know.
    storage, same = inputs[0].untyped_storage(), inputs[0].data
    size = storage.nbytes()
    storage.resize_(0)

    def fill(_: Tensor) -> None:
        with torch.no_grad():
            storage.resize_(size)
            remake(same)

    outputs[0].register_hook(fill)
