"""Optimizer state that rests in host memory while a step's packs run, and is on the device for the update alone.

Activations and optimizer state are never needed at once, so the larger of the two decides a GPU's peak instead of their
sum. The update stays where it was. (megatron-core's `HybridDeviceOptimizer` updates on the CPU: float32 copies of
parameters, gradients and moments there, 16 bytes a parameter, and Adam on the processor's cores for every step.)

Tensors keep their identity: their memory is given back and filled again, so that optimizers and checkpoints hold what
they held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Resting:
    """The state of some optimizers, on the device or in host memory.

    Args:
        optimizers: Of them moments and whatever else their state holds, and parameters of their own (master weights).
        model: Module whose own parameters stay.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], model: torch.nn.Module) -> None:
        self._optimizers = list(optimizers)
        self._model = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._pinned: dict[int, Tensor] = {}
        self._resting: list[tuple[Tensor, Tensor]] = []
        self._asleep = False

    @property
    def asleep(self) -> bool:
        """Whether the state is in host memory now."""
        return self._asleep

    def rest(self) -> None:
        """Move everything to the host, and give its device memory back."""
        if self._asleep:
            return
        moving = list(self._tensors())
        hosts = [self._host(tensor).copy_(_bytes(tensor), non_blocking=True) for tensor in moving]
        if any(tensor.is_cuda for tensor in moving):
            torch.cuda.synchronize()
        for tensor in moving:
            tensor.untyped_storage().resize_(0)
        self._resting = list(zip(moving, hosts, strict=True))
        self._asleep = True

    def wake(self) -> None:
        """Bring everything back."""
        if not self._asleep:
            return
        for tensor, host in self._resting:
            tensor.untyped_storage().resize_(host.numel())
            _bytes(tensor).copy_(host, non_blocking=True)
        self._resting.clear()
        self._asleep = False

    def _tensors(self) -> Iterator[Tensor]:
        """One tensor for each piece of memory that only the optimizers hold."""
        seen = set(self._model)
        for optimizer in self._optimizers:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            states = (value for state in optimizer.state.values() for value in state.values())
            for tensor in (*parameters, *states):
                # Scalars (step counts) are not worth a copy.
                if not isinstance(tensor, Tensor) or tensor.numel() < 2:
                    continue
                place = tensor.untyped_storage().data_ptr()
                if place and place not in seen:
                    seen.add(place)
                    yield tensor

    def _host(self, tensor: Tensor) -> Tensor:
        """Pinned memory for a tensor's storage, made once: it is as large as the state, and slow to pin."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._pinned or self._pinned[key].numel() != storage.nbytes():
            self._pinned[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
        return self._pinned[key]


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's whole storage as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
