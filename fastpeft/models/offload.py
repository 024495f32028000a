"""Tensors that wait in pinned host memory between forward and backward, moved beside the computation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Kept(Protocol):
    """A tensor that is kept for backward."""

    def prefetch(self) -> None:
        """Have it brought near, without waiting."""

    def take(self) -> Tensor:
        """Give it back; once."""


class Here:
    """A tensor kept where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor

    def prefetch(self) -> None:
        """Nothing to do."""

    def take(self) -> Tensor:
        """The tensor; this object lets go of it."""
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        return tensor


class Shelf:
    """Pinned host memory of one model's checkpoints, and the stream that copies to it and back.

    Buffers are kept for the next step, as pinning memory costs milliseconds. Copies run on one side stream, in order,
    so that a buffer that is handed on is never overwritten before it was read.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def put(self, tensor: Tensor) -> Kept:
        """Copy a tensor to the host, beside whatever runs next; on a CPU it stays where it is."""
        if tensor.device.type != "cuda":
            return Here(tensor)
        tensor = tensor.contiguous()
        return _OnHost(self, tensor)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream for copies to and from a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def buffer(self, like: Tensor) -> Tensor:
        """Pinned memory for a tensor."""
        free = self._free.get((like.shape, like.dtype))
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def free(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shelf:
        return Shelf()


class _OnHost:
    def __init__(self, shelf: Shelf, tensor: Tensor) -> None:
        self._shelf, self._device = shelf, tensor.device
        self._host: Tensor | None = shelf.buffer(tensor)
        self._back: Tensor | None = None
        self._arrived: Any = None
        stream = shelf.stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before the copy has read it

    def prefetch(self) -> None:
        """Begin the copy back once what the current stream has been given so far is done."""
        if self._back is not None or self._host is None:
            return
        stream, current = self._shelf.stream(self._device), torch.cuda.current_stream(self._device)
        self._back = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        stream.wait_stream(current)  # the memory may still be read by work that was queued before
        with torch.cuda.stream(stream):
            self._back.copy_(self._host, non_blocking=True)
            self._arrived = stream.record_event()  # type: ignore[no-untyped-call]
        self._back.record_stream(stream)

    def take(self) -> Tensor:
        """The tensor on its device; the current stream waits for the copy, the host does not."""
        self.prefetch()
        tensor, host = self._back, self._host
        assert tensor is not None and host is not None
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
        self._back = self._host = None
        self._shelf.free(host)
        return tensor
