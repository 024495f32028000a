"""The device's ceilings, measured once a run: read and copy bandwidth, the bf16 matrix rate, and the link to the host.

A case's floor is the largest of its bytes over a bandwidth, its operations over the matrix rate, and its bytes on the
host over the rate of the link in one direction while the other is as busy; the percentage in a row is that floor over
the measured time. Datasheet figures are not used.
"""

from __future__ import annotations

import time
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
    """Measured ceilings of a device, in bytes and operations a second; a link of 0 is none."""

    read: float
    copy: float
    matmul: float
    link: float = 0.0

    def bandwidth(self, work: Work) -> float:
        """The bandwidth that bounds this work."""
        return self.read if work.memory == "read" else self.copy


@dataclass(frozen=True)
class Attained:
    """How near a measured time comes to its floor.

    Attributes:
        roof: which ceiling gives the floor: ``read``, ``copy``, ``matmul`` or ``link``.
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
    link_floor_s = work.link_bytes / roofs.link if roofs.link else 0.0
    if link_floor_s > max(memory_floor_s, matmul_floor_s):
        return Attained("link", work.link_bytes / seconds, link_floor_s / seconds)
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
        link = _link_rate(device) if cuda else 0.0
    return Roofs(read=read, copy=copy, matmul=matmul, link=link)


def _link_rate(device: torch.device) -> float:
    """Bytes a second each way between pinned host memory and the device, both ways at once.

    The two directions are timed together, over copies long enough that their ends do not count.
    """
    size, copies = 1 << 28, 4
    near = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    far = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
    seconds = []
    for _ in range(_REPS):
        torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        for _ in range(copies):
            with torch.cuda.stream(streams[0]):
                near[0].copy_(far[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                far[1].copy_(near[1], non_blocking=True)
        torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - start_s) / copies)
    return size / sorted(seconds)[len(seconds) // 2]


def _matmul_rate(timer: Timer, inputs: Inputs, m: int, n: int, k: int) -> float:
    x: Tensor = inputs.randn(m, k)
    w: Tensor = inputs.randn(n, k)
    return 2 * m * n * k / _median_s(timer, partial(torch.nn.functional.linear, x, w))


def _median_s(timer: Timer, call: Callable[[], Tensor]) -> float:
    """Median seconds of a call; its kernels last so long that launching them from Python costs nothing."""
    timed = timer.prepare(Calls((call,), eager_because="long kernels"))
    return timer.interleave({"roof": timed}, _REPS)["roof"].median * 1e-6
