"""Steps of an engine: captured into CUDA graphs by batch size where that is possible, and read one step late."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastpeft.models.decode.rows import Rows

_Step = Callable[[int, Rows, Tensor], None]
_Result = TypeVar("_Result")
_MODULES_OWN = frozenset(nn.Module().__dict__)  # tensors, submodules and hooks, which are no settings


class Pool:
    """Memory that graphs share, as none is replayed beside another; made when the first is captured."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """As torch's graphs take it."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


def captured(run: Callable[[], _Result], pool: Pool) -> tuple[Any, _Result]:
    """Run something on a stream beside, then capture it.

    Returns:
        The graph, and what its replays compute, in memory of the pool.
    Raises:
        RuntimeError: it looks at values on the host, or does something else that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.handle):
        result = run()
    return graph, result


class Drawn:
    """Tokens and log-probabilities on their way to the host."""

    def __init__(self, token: Tensor, logprob: Tensor, ready: Any) -> None:
        self._token, self._logprob, self._ready = token, logprob, ready

    def read(self) -> tuple[list[int], list[float]]:
        """Wait for them."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._token.tolist(), self._logprob.tolist()


class Steps:
    """Runs steps of the first rows.

    Args:
        step: computes one.
        most: rows there are.
        pool: memory for capturing each size once and replaying it; None launches every step.
    """

    def __init__(self, step: _Step, most: int, pool: Pool | None) -> None:
        self._step = step
        self._sizes: list[int] = [*(size for size in map(_power, range(20)) if size < most), most]
        self._pool = pool
        self._graphs: dict[int, Any] = {}
        self._host: list[tuple[Tensor, Tensor]] = []
        self._turn = 0

    def size(self, rows: int) -> int:
        """The smallest batch that has so many rows."""
        return next(size for size in self._sizes if size >= rows)

    def run(self, size: int, rows: Rows, stop_ids: Tensor) -> Drawn:
        """Start a step, and the copy of what it draws."""
        if self._pool is not None and size not in self._graphs:
            self._graphs[size] = self._captured(size, rows, stop_ids, self._pool)
        if self._pool is not None:
            self._graphs[size].replay()
        else:
            self._step(size, rows, stop_ids)
        token, logprob = rows.state.token[:size], rows.state.logprob[:size]
        if token.device.type != "cuda":
            return Drawn(token.clone(), logprob.clone(), None)
        if not self._host:  # two in turns: one is read while the other is written
            self._host = [
                (torch.empty(rows.size, dtype=token.dtype).pin_memory(), torch.empty(rows.size).pin_memory())
                for _ in range(2)
            ]
        self._turn = 1 - self._turn
        host_token, host_logprob = (host[:size] for host in self._host[self._turn])
        host_token.copy_(token, non_blocking=True)
        host_logprob.copy_(logprob, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Drawn(host_token, host_logprob, ready)

    def _captured(self, size: int, rows: Rows, stop_ids: Tensor, pool: Pool) -> Any:
        """A captured step; while it is tried out all rows are idle, so that nothing moves on.

        A model whose forward looks at values on the host cannot be captured, and runs as it is.
        """
        lengths = rows.state.lengths.clone()
        rows.state.lengths.fill_(-1)
        try:
            return captured(lambda: self._step(size, rows, stop_ids), pool)[0]
        except RuntimeError as error:
            self._pool = None
            said = str(error).strip().splitlines()
            warnings.warn(
                f"generate: a step cannot be captured into a CUDA graph ({said[0] if said else type(error).__name__}); "
                "steps are launched one by one, more slowly",
                stacklevel=2,
            )
            return None
        finally:
            rows.state.lengths.copy_(lengths)


def _power(exponent: int) -> int:
    return int(2**exponent)


def fingerprint(model: nn.Module) -> int:
    """What a captured step depends on: where the weights are, and every plain setting of every module."""
    parts: list[Any] = []
    for module in model.modules():
        parts.append(id(module))
        parts += [p.data_ptr() for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
        parts += [_plain(value) for name, value in module.__dict__.items() if name not in _MODULES_OWN]
    return hash(tuple(parts))


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple(
            (str(key), _plain(item)) for key, item in value.items() if isinstance(item, (bool, int, float, str, list))
        )
    return None
