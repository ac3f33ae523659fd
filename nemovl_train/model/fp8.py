"""Linear layers that multiply in FP8 while they train.

A layer runs inside a context in which the backend's linears quantise what they multiply; its weights stay bfloat16, so
that optimizer and checkpoints do not know of it. Layers are wrapped rather than the stack, because a layer that is run
again in backward has to enter the context again.

Quantised weights are kept from micro-batch to micro-batch of a step, two bytes a parameter, and are dropped before the
next one. Transformer Engine would refresh them in place when `is_first_microbatch` is set, but then also writes weight
gradients over `main_grad` instead of adding to it: a tower that runs several times in one micro-batch would lose all of
its gradients but one call's. So the flag is never set.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

Context = Callable[[], AbstractContextManager[Any]]


def multiply_in_fp8(modules: Iterable[nn.Module], context: Context) -> None:
    """Make modules enter the context in every forward pass of training. In evaluation mode they do not.

    Recomputation of a whole module has to be set after this, around it.

    Args:
        modules: Layers, or the projector.
        context: As a backend gives it.
    """
    for module in modules:
        module.forward = partial(_forward, module, module.forward, context)


def _forward(module: nn.Module, forward: Callable[..., Any], context: Context, /, *args: Any, **kwargs: Any) -> Any:
    if not module.training:
        return forward(*args, **kwargs)
    with context():
        return forward(*args, **kwargs)


def forget_quantized_weights(model: nn.Module) -> None:
    """Drop what linears keep of their weights in FP8, because the weights may have changed."""
    for module in model.modules():
        kept = getattr(module, "_fp8_workspaces", None)
        if kept is not None:
            kept.clear()
            module.is_first_microbatch = False  # type: ignore[assignment]


def in_fp8(linear: nn.Module) -> bool:
    """Whether a linear's last forward pass multiplied in FP8, and so kept no bfloat16 input."""
    return getattr(linear, "fp8", False) is True
