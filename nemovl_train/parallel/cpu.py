"""Lets megatron-core's trainer run on a machine without CUDA by making "the CUDA device" mean the CPU.

megatron-core builds its gradient buffers, loss scalars and random states on `torch.cuda` without asking. The names in
`REPLACEMENTS`, and only those, are replaced; its DDP, distributed optimizer, schedules, recompute, clipping and
sharded checkpoints then run unmodified over gloo. Nothing is replaced when CUDA is there.

Device literals (`device="cuda"`) are caught by giving the few megatron-core modules that hold them an own `torch`
name. A global `TorchFunctionMode` would catch them too, but it slows down every operation of the model.
"""

import functools
import importlib
import logging
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Replacement:
    """One replaced name.

    Attributes:
        why: What megatron-core (files relative to `megatron/core`) does with it.
        value: What takes its place.
    """

    why: str
    value: Any


class _CpuTorch(types.ModuleType):
    """The `torch` module as some megatron-core modules see it: CUDA device literals mean the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps a tensor factory so that `device="cuda"` makes a CPU tensor."""

    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        is_cuda = device is not None and torch.device(device).type == "cuda"
        return factory(*args, device=_CPU if is_cuda else device, **kwargs)

    return make


_plain_type = torch.Tensor.type


def _cuda_type(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    """`Tensor.type`, naming a CPU tensor's type as its CUDA twin."""
    if dtype is not None:
        return _plain_type(self, dtype, non_blocking, **kwargs)
    return _plain_type(self).replace("torch.", "torch.cuda.", 1)


def _same_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


def _init_data(self: Any, device: Any, init_fn: Callable[..., torch.Tensor] = torch.empty) -> None:
    """`ShardedTensor.init_data`, always on the CPU."""
    if self.data is None:
        self.data = init_fn(self.local_shape, dtype=self.dtype, device=_CPU)


_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"


def _state_dict(self: Any) -> dict[str, Any]:
    """`DistributedOptimizer.state_dict`, also before the first step, when PyTorch's AdamW has no state yet."""
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            state = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                state.setdefault(key, torch.zeros_like(parameter))
            state.setdefault("step", torch.zeros(()))
    return _originals[f"{_DISTRIBUTED_OPTIMIZER}.state_dict"](self)


def _load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    """`DistributedOptimizer.load_state_dict`, with a step count of its own for every parameter."""
    _originals[f"{_DISTRIBUTED_OPTIMIZER}.load_state_dict"](self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


def _set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    """`DistributedOptimizer._set_main_param_and_optimizer_states`; the step count stays as loaded."""
    name = f"{_DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states"
    _originals[name](self, model_param, {"step": None, **tensors})


_originals: dict[str, Any] = {}
_cpu_torch = _CpuTorch()

REPLACEMENTS: dict[str, Replacement] = {
    "torch.cuda.current_device": Replacement(
        "distributed/param_and_grad_buffer.py allocates gradient and parameter buffers; tensor_parallel/layers.py "
        "and mappings.py weights and gathered activations; dist_checkpointing/strategies/state_dict_saver.py a flag",
        lambda: _CPU,
    ),
    "torch.cuda.current_stream": Replacement(
        "distributed/param_and_grad_buffer.py asks for it before every gradient reduction", lambda *_a, **_k: None
    ),
    "torch.cuda.synchronize": Replacement(
        "dist_checkpointing/strategies/filesystem_async.py waits for device-to-host copies before writing",
        lambda *_a, **_k: None,
    ),
    "torch.cuda.manual_seed": Replacement(
        "tensor_parallel/random.py seeds the model parallel generator", torch.manual_seed
    ),
    "torch.cuda.get_rng_state": Replacement(
        "tensor_parallel/random.py keeps the seeded states of its generator tracker",
        lambda *_a, **_k: torch.get_rng_state(),
    ),
    "torch.cuda.random.get_rng_state": Replacement(
        "tensor_parallel/random.py, CheckpointFunction and the tracker's fork, save the state before recompute",
        lambda *_a, **_k: torch.get_rng_state(),
    ),
    "torch.Tensor.type": Replacement(
        "optimizer/distrib_optimizer.py, optimizer.py and clip_grads.py compare it with 'torch.cuda.FloatTensor'",
        _cuda_type,
    ),
    "torch.Tensor.cuda": Replacement(
        "dist_checkpointing/exchange_utils.py moves shards to the device before ranks exchange them", _same_tensor
    ),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": Replacement(
        "the generator tracker and CheckpointFunction restore states with it; without CUDA it silently does nothing",
        lambda state, *_a, **_k: torch.set_rng_state(state),
    ),
    "megatron.core.optimizer.optimizer.torch": Replacement(
        "optimizer/optimizer.py makes its found-inf flag and scale with device='cuda'", _cpu_torch
    ),
    "megatron.core.optimizer.clip_grads.torch": Replacement(
        "optimizer/clip_grads.py makes the gradient norm with device='cuda'", _cpu_torch
    ),
    "megatron.core.pipeline_parallel.schedules.torch": Replacement(
        "pipeline_parallel/schedules.py counts tokens in a tensor with device='cuda'", _cpu_torch
    ),
    "megatron.core.utils.torch": Replacement(
        "utils.py makes the norm of a list of gradients with device='cuda' where apex is missing", _cpu_torch
    ),
    "megatron.core.dist_checkpointing.mapping.ShardedTensor.init_data": Replacement(
        "dist_checkpointing/exchange_utils.py allocates with it what other ranks will send, on 'cuda'", _init_data
    ),
    "megatron.core.dist_checkpointing.exchange_utils.torch": Replacement(
        "dist_checkpointing/exchange_utils.py allocates exchange buffers with device='cuda'", _cpu_torch
    ),
    f"{_DISTRIBUTED_OPTIMIZER}.state_dict": Replacement(
        "optimizer/distrib_optimizer.py asks a fresh optimizer for its step count when it loads; the fused CUDA Adam "
        "has one, PyTorch's AdamW, which takes its place without CUDA, has none before its first step",
        _state_dict,
    ),
    f"{_DISTRIBUTED_OPTIMIZER}.load_state_dict": Replacement(
        "optimizer/distrib_optimizer.py gives all parameters one step tensor, which PyTorch's AdamW then counts up "
        "once a parameter: the first step after a resume would be another one",
        _load_state_dict,
    ),
    f"{_DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states": Replacement(
        "optimizer/distrib_optimizer.py meets PyTorch AdamW's `step` among the states and misses it in the checkpoint",
        _set_states,
    ),
}


def install_if_no_cuda() -> None:
    """Replaces the names above and imports megatron-core; does nothing when CUDA is there or when called again.

    Call it before the first `import megatron.core` of a module.
    """
    if torch.cuda.is_available() or _originals:
        return
    for name in (n for n in REPLACEMENTS if n.startswith("torch.")):
        _replace(name)
    with _quiet_import():
        importlib.import_module("megatron.core.models.backends")  # with it, everything that notes a missing package
        for name in (n for n in REPLACEMENTS if n.startswith("megatron.")):
            _replace(name)


@contextmanager
def restored(name: str) -> Iterator[None]:
    """Puts one original back inside the `with` block, to show that megatron-core still needs the replacement."""
    owner, attribute = _resolve(name)
    setattr(owner, attribute, _originals[name])
    try:
        yield
    finally:
        setattr(owner, attribute, REPLACEMENTS[name].value)


def _replace(name: str) -> None:
    owner, attribute = _resolve(name)
    _originals[name] = getattr(owner, attribute)
    setattr(owner, attribute, REPLACEMENTS[name].value)


def _resolve(name: str) -> tuple[Any, str]:
    """The module or class that holds a dotted name, and the name's last part."""
    *path, attribute = name.split(".")
    owner: Any = importlib.import_module(path[0])
    for depth, part in enumerate(path[1:], start=2):
        if not hasattr(owner, part):
            importlib.import_module(".".join(path[:depth]))
        owner = getattr(owner, part)
    return owner, attribute


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Hides the notes about missing CUDA packages that an import without CUDA always prints."""
    extension_log = logging.getLogger("torch.utils.cpp_extension")
    level = extension_log.level
    extension_log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        warnings.filterwarnings("ignore", message="Apex is not installed")
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r"The following imports from", category=DeprecationWarning)
        try:
            yield
        finally:
            extension_log.setLevel(level)
