"""Counts the bytes of the tensors that a block makes, as a GPU's allocator would: those alive, and the most at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class TensorMemory(TorchDispatchMode):
    """Within the ``with`` block every storage that an operation makes is counted until it is freed.

    Attributes:
        alive: bytes now.
        peak: the most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def count(self, *tensors: Tensor) -> None:
        """Count tensors that were there before, or that no operation made."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type != "meta" and key not in self._known and storage.nbytes():
                self._known.add(key)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.alive)

    def reset(self) -> None:
        """Look for the most bytes from now on."""
        self.peak = self.alive

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.alive -= nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count(*_tensors(out))
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
