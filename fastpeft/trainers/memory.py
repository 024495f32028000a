"""Memory of a run: the peak of its training steps, and what of it is what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.nn import NF4Module
from fastpeft.trainers.metrics import memory_bytes


class PeakMemory:
    """The most bytes allocated on a GPU since `start`, without what `apart` surrounds; on a CPU what is occupied now.

    Args:
        device: of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        """Count from here: loading a model may take more than training it."""
        self._before = 0
        self._reset()

    def read(self) -> int:
        """Bytes."""
        return max(self._before, memory_bytes(self._device))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave what happens inside out; within it, torch's own peak is that of the inside alone."""
        before = self.read() if self._device.type == "cuda" else 0
        self._reset()
        try:
            yield
        finally:
            self._before = before
            self._reset()

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def memory_by_kind(model: nn.Module, optimizer: Any, device_type: str, peak: int | None) -> dict[str, int]:
    """Split a run's memory on the device.

    Args:
        model: what trains, in whatever wraps it.
        optimizer: over its trainable parameters, or accelerate's wrapper of one.
        device_type: whose memory: "cuda" or "cpu".
        peak: bytes of the most that was allocated; None where that is not known.
    Returns:
        Bytes: ``weights`` that are frozen, NF4 scales and buffers included; ``trained`` parameters; ``gradients``,
        which are as large as those; state of the ``optimizer``; and with a peak ``activations``, its remainder, in
        which workspaces are too.
    """
    weights = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    for module in model.modules():
        for nf4 in module.packed.values() if isinstance(module, NF4Module) else ():
            weights += [part for part in (nf4.absmax, nf4.nested_absmax, nf4.offset) if part is not None]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    size = _bytes_on(trained, device_type)
    kinds = {
        "weights": _bytes_on(weights, device_type),
        "trained": size,
        "gradients": size,
        "optimizer": _state_bytes(getattr(optimizer, "optimizer", optimizer), device_type),
    }
    if peak is not None:
        kinds["activations"] = max(0, peak - sum(kinds.values()))
    return kinds


def _bytes_on(tensors: list[Tensor], device_type: str) -> int:
    """Bytes of distinct tensors; tied ones count once."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values() if t.device.type == device_type)


def _state_bytes(optimizer: Any, device_type: str) -> int:
    if hasattr(optimizer, "memory"):  # fastpeft's, which may have pages of it elsewhere
        return int(optimizer.memory()["device" if device_type == "cuda" else "host"])
    values = [value for state in optimizer.state.values() for value in state.values()]
    return _bytes_on([value for value in values if isinstance(value, Tensor)], device_type)
