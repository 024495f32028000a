"""What a benchmark is made of: a suite lists cases, a case prepares a trial, a trial holds contenders and a check."""

from __future__ import annotations

import importlib
import importlib.util
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "fastpeft"
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# A buffer that is read again only after this many L2 sizes of other data has left the cache.
_L2_SIZES_BETWEEN_READS = 4
_CPU_SETS = 2


class PeerMissing(Exception):
    """A peer cannot take part because its package is not installed; the row says so."""


def require(package: str) -> ModuleType:
    """Import a peer's package.

    Args:
        package: the name it is imported by.
    Returns:
        The module.
    Raises:
        PeerMissing: the package is not installed. An installed package that fails to import raises its own error.
    """
    if importlib.util.find_spec(package) is None:
        raise PeerMissing("not installed")
    return importlib.import_module(package)


@dataclass(frozen=True)
class Check:
    """How wrong a contender's outputs are, and how wrong they may be.

    Attributes:
        error: outputs of a contender to one number; NaN never passes.
        tolerance: the largest number that passes.
        measure: what the number is.
    """

    error: Callable[[Sequence[Tensor]], float]
    tolerance: float
    measure: str = "relative error"

    def passes(self, error: float) -> bool:
        """Whether an error is small enough; false for NaN."""
        return error <= self.tolerance

    @property
    def bar(self) -> Bar:
        """What is kept of it in a row: the check itself holds the case's inputs."""
        return Bar(self.measure, self.tolerance)


@dataclass(frozen=True)
class Bar:
    """What outputs were judged by.

    Attributes:
        measure: what the number is.
        tolerance: the largest that passes.
    """

    measure: str
    tolerance: float


@dataclass(frozen=True)
class Calls:
    """One contender: the same call over several input sets.

    Attributes:
        calls: one closure an input set; timing runs through all of them, so that no call finds its inputs in L2.
        outputs: gives the tensors to check, called once; by default what the first closure returns.
        eager_because: when not empty, the calls are never captured into a CUDA graph, for this reason.
        note: what a reader of the results should know about this contender.
        check: judges its outputs, when it computes less than the others; by default the trial's check.
    """

    calls: Sequence[Callable[[], Any]]
    outputs: Callable[[], Sequence[Tensor]] | None = None
    eager_because: str = ""
    note: str = ""
    check: Check | None = None

    def checkable(self) -> list[Tensor]:
        """Run once and return the tensors to check.

        A plain call runs twice: the first results are overwritten with NaN and freed, so that the allocator hands
        their memory to the second run and an element that is never written shows.
        """
        if self.outputs is not None:
            return _tensors(self.outputs())
        for tensor in _tensors(self.calls[0]()):
            tensor.fill_(math.nan)
        return _tensors(self.calls[0]())


def _tensors(result: Any) -> list[Tensor]:
    return [tensor.detach() for tensor in ([result] if isinstance(result, Tensor) else result)]


@dataclass(frozen=True)
class Work:
    """The least a call has to do, which with the measured roofs gives its floor.

    Attributes:
        bytes: every input read once and every output written once.
        flops: floating-point operations of its matrix products; 0 when there are none.
        memory: the bandwidth that bounds it: ``read`` when it mostly reads, ``copy`` when it also writes.
        link_bytes: what has to come from host memory, while as much goes back there; 0 for nothing.
    """

    bytes: int
    flops: int = 0
    memory: Literal["read", "copy"] = "read"
    link_bytes: int = 0


@dataclass(frozen=True)
class Trial:
    """A prepared case: inputs are on the device, nothing has been timed.

    Attributes:
        ours: fastpeft's calls.
        peers: name to a function that builds the peer's calls; it may raise PeerMissing or anything else.
        work: bytes and operations of one call.
        check: judges the outputs of every contender that has no check of its own.
    """

    ours: Calls
    peers: Mapping[str, Callable[[], Calls]]
    work: Work
    check: Check


class Inputs:
    """Fresh random inputs on one device, in as many sets as keep them out of the cache.

    Args:
        device: where the tensors are made.
        seed: of the generator; the same seed gives the same inputs.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Normal values of standard deviation ``scale``."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype).mul_(scale)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform int64 values from 0 to ``high - 1``."""
        return torch.randint(0, high, shape, generator=self._generator, device=self.device)

    def sets(self, bytes_per_set: int) -> int:
        """How many input sets of this size a contender has to rotate through so that L2 serves none of them."""
        if self.device.type != "cuda":
            return _CPU_SETS
        return max(1, math.ceil(_L2_SIZES_BETWEEN_READS * l2_bytes(self.device) / bytes_per_set))


def l2_bytes(device: torch.device) -> int:
    """Size of a CUDA device's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@dataclass(frozen=True)
class Case:
    """One row of a suite.

    Attributes:
        op: what is timed; opens the row and the id.
        sizes: names and values in the order they are printed.
        dtype: of the inputs.
        prepare: makes the inputs and the contenders.
        quick: whether the two-minute subset has it.
        show_memory: whether the row says what a call allocates.
    """

    op: str
    sizes: Mapping[str, int | float | str]
    dtype: torch.dtype
    prepare: Callable[[Inputs], Trial] = field(repr=False, compare=False)
    quick: bool = False
    show_memory: bool = False

    @property
    def label(self) -> str:
        """As rows show it: ``nf4_gemm m=16 n=4096 k=4096 bf16``."""
        return " ".join([self.op, *(f"{name}={value}" for name, value in self.sizes.items()), DTYPE_NAMES[self.dtype]])

    @property
    def id(self) -> str:
        """As tests and ``--filter`` name it: ``nf4_gemm-m16-n4096-k4096-bf16``."""
        return "-".join([self.op, *(f"{name}{value}" for name, value in self.sizes.items()), DTYPE_NAMES[self.dtype]])

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        """The case's own random inputs under a run's seed; torch's default generators are seeded with it too."""
        own_seed = (seed + zlib.crc32(self.id.encode())) % 2**63
        torch.manual_seed(own_seed)
        return Inputs(device, own_seed)


@dataclass(frozen=True)
class Suite:
    """A named list of cases that share their peers.

    Attributes:
        name: the argument of ``python -m bench``, and the results file's name.
        about: one line for ``--list``.
        peers: names of the peers every case compares with.
        cases: device type (``cuda`` or ``cpu``) to cases; on a CPU small sizes that end in seconds.
    """

    name: str
    about: str
    peers: tuple[str, ...]
    cases: Callable[[str], list[Case]]

    def select(self, device_type: str, quick: bool = False, text: str = "") -> list[Case]:
        """The cases for a device, narrowed to the quick ones and to those whose id or label contains ``text``."""
        return [
            case
            for case in self.cases(device_type)
            if (case.quick or not quick) and (text in case.id or text in case.label)
        ]
