"""The device's ceilings, measured once a run: read and copy bandwidth and the bf16 matrix rate.

A case's floor is the larger of its bytes over a bandwidth and its operations over the matrix rate; the percentage in
a row is that floor over the measured time. Datasheet figures are not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from bench.case import Calls, Inputs, Work
from bench.timing import Timer

_REPS = 10


@dataclass(frozen=True)
class Roofs:
    """Measured ceilings of a device, in bytes and operations a second."""

    read: float
    copy: float
    matmul: float

    def bandwidth(self, work: Work) -> float:
        """The bandwidth that bounds this work."""
        return self.read if work.memory == "read" else self.copy


@dataclass(frozen=True)
class Attained:
    """How near a measured time comes to its floor.

    Attributes:
        roof: which ceiling gives the floor: ``read``, ``copy`` or ``matmul``.
        rate: bytes or operations a second that were attained against it.
        fraction: floor over time.
    """

    roof: str
    rate: float
    fraction: float


def attained(work: Work, time_us: float, roofs: Roofs) -> Attained:
    """Compare a time with the work's floor."""
    seconds = time_us * 1e-6
    memory_floor_s = work.bytes / roofs.bandwidth(work)
    matmul_floor_s = work.flops / roofs.matmul
    if matmul_floor_s > memory_floor_s:
        return Attained("matmul", work.flops / seconds, matmul_floor_s / seconds)
    return Attained(work.memory, work.bytes / seconds, memory_floor_s / seconds)


@cache
def measure_roofs(device: torch.device) -> Roofs:
    """Measure a device's ceilings; later calls in the same process get the same figures."""
    timer = Timer(device)
    cuda = device.type == "cuda"
    with timer.scope():
        inputs = Inputs(device, seed=0)
        x = inputs.randn(1 << 28 if cuda else 1 << 23, dtype=torch.float32)
        y = torch.empty_like(x)
        x_bytes = x.numel() * x.element_size()
        copy = 2 * x_bytes / _median_s(timer, partial(y.copy_, x))
        read = max(
            x_bytes / _median_s(timer, x.sum),
            x_bytes / _median_s(timer, x.amax),
            2 * x_bytes / _median_s(timer, partial(torch.dot, x, y)),
        )
        del x, y
        shapes = [(8192, 8192, 8192), (8192, 14336, 4096)] if cuda else [(256, 1024, 1024)]
        matmul = max(_matmul_rate(timer, inputs, *shape) for shape in shapes)
    return Roofs(read=read, copy=copy, matmul=matmul)


def _matmul_rate(timer: Timer, inputs: Inputs, m: int, n: int, k: int) -> float:
    x: Tensor = inputs.randn(m, k)
    w: Tensor = inputs.randn(n, k)
    return 2 * m * n * k / _median_s(timer, partial(torch.nn.functional.linear, x, w))


def _median_s(timer: Timer, call: Callable[[], Tensor]) -> float:
    """Median seconds of a call; its kernels last so long that launching them from Python costs nothing."""
    timed = timer.prepare(Calls((call,), eager_because="long kernels"))
    return timer.interleave({"roof": timed}, _REPS)["roof"].median * 1e-6
