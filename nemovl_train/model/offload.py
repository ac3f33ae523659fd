"""Inputs of recomputed layers in host memory: copied out behind the forward pass, fetched ahead of the backward pass.

At long contexts the layers' inputs alone fill a GPU (311,296 tokens of the 12B model over 4 ranks: 46 GiB each). They
are written once and read once, in opposite order, which gives a copy in each direction a whole layer's time. Copies go
over a stream of their own; host memory is pinned, and PyTorch keeps it for the next micro-batch.

`torch.autograd.graph.save_on_cpu` is the same without a stream: every copy would be waited for. Transformer Engine's
offloading moves all tensors that a layer saves, and wants a call between layers.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2**16
"""Elements below which a tensor stays: checkpointing saves a dummy beside the input."""


class Offloaded:
    """A tensor on its way to the host, there, or on its way back.

    Args:
        tensor: What to keep; nobody may write to it.
        before: What was sent before it, and will be asked for after it.
        stream: For the copies; None on a CPU, where they are made at once.
    """

    def __init__(self, tensor: Tensor, before: Offloaded | None, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = tensor.device, stream
        self._before = weakref.ref(before) if before is not None else None
        self._fetched: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        # Its memory is given to others only when the copy is over.
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Begin the copy back."""
        if self._fetched is not None:
            return
        if self._stream is None:
            self._fetched = self.host.clone()
            return
        fetched = torch.empty(self.host.shape, dtype=self.host.dtype, device=self._device)
        # Memory that is free for this stream may still be read by kernels before this point of it.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            fetched.copy_(self.host, non_blocking=True)
            self._arrived = self._stream.record_event()
        fetched.record_stream(self._stream)
        self._fetched = fetched

    def get(self) -> Tensor:
        """The tensor on its device again; the one that was sent before it sets off."""
        self.fetch()
        before = self._before() if self._before is not None else None
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
        if before is not None:
            before.fetch()
        assert self._fetched is not None
        return self._fetched


class Host:
    """Where the layers of one part keep their inputs.

    Attributes:
        sent: Tensors that were sent, and `asked`, that were asked for, so far.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[Offloaded] | None = None
        self._stream: torch.cuda.Stream | None = None
        self.sent, self.asked = 0, 0

    def hooks(self) -> AbstractContextManager[Any]:
        """Context in which what autograd saves goes to the host."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Offloaded:
        if tensor.numel() < SMALLEST:
            return tensor
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream()
        before = self._last() if self._last is not None else None
        sent = Offloaded(tensor.detach(), before, self._stream)
        self._last = weakref.ref(sent)
        self.sent += 1
        return sent

    def _unpack(self, kept: Tensor | Offloaded) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.asked += 1
        return kept.get()
