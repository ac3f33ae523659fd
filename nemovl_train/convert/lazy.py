"""Tensors that are read when asked for: what a conversion hands on, so that no step ever holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """Shape and number format of a tensor, known before its values are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Of a tensor, which may be on the meta device."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.count * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Tensors:
    """A set of tensors by name. Iterating gives (name, tensor), one after the other.

    Attributes:
        specs: Shape and format of each, in order.
        read: Gives the tensor of a name, on the CPU.
    """

    specs: Mapping[str, Spec]
    read: Callable[[str], Tensor]

    @classmethod
    def of(cls, tensors: Tensors | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> Tensors:
        """The same set of tensors; those held in memory stay there."""
        if isinstance(tensors, Tensors):
            return tensors
        held = dict(tensors)
        return cls({name: Spec.of(tensor) for name, tensor in held.items()}, held.__getitem__)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.read(name)) for name in self.specs)

    def remembering(self) -> Tensors:
        """The same, with the tensor that was read last kept: for readers that want it in pieces."""
        last: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in last:
                last.clear()
                last[name] = self.read(name)
            return last[name]

        return Tensors(self.specs, read)
