"""Steps of an engine: captured into CUDA graphs by batch size where that is possible, and read one step late."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.models.decode.rows import Rows

_Step = Callable[[int, Rows, Tensor], None]


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
        use_graphs: capture each size once and replay it.
    """

    def __init__(self, step: _Step, most: int, use_graphs: bool) -> None:
        self._step = step
        self._sizes: list[int] = [*(size for size in map(_power, range(20)) if size < most), most]
        self._use_graphs = use_graphs
        self._graphs: dict[int, Any] = {}
        self._pool: Any = None
        self._host: list[tuple[Tensor, Tensor]] = []
        self._turn = 0

    def size(self, rows: int) -> int:
        """The smallest batch that has so many rows."""
        return next(size for size in self._sizes if size >= rows)

    def run(self, size: int, rows: Rows, stop_ids: Tensor) -> Drawn:
        """Start a step, and the copy of what it draws."""
        if self._use_graphs and size not in self._graphs:
            self._graphs[size] = self._captured(size, rows, stop_ids)
        if self._use_graphs:
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

    def _captured(self, size: int, rows: Rows, stop_ids: Tensor) -> Any:
        """A captured step; a model whose forward looks at values on the host cannot be captured, and runs as it is."""
        lengths = rows.state.lengths.clone()
        try:
            return self._capture(size, rows, stop_ids)
        except RuntimeError as error:
            self._use_graphs = False
            rows.state.lengths.copy_(lengths)
            said = str(error).strip().splitlines()
            warnings.warn(
                f"generate: a step cannot be captured into a CUDA graph ({said[0] if said else type(error).__name__}); "
                "steps are launched one by one, more slowly",
                stacklevel=2,
            )
            return None

    def _capture(self, size: int, rows: Rows, stop_ids: Tensor) -> Any:
        """Capture a step; while it is tried out all rows are idle, so that nothing moves on."""
        lengths = rows.state.lengths.clone()
        rows.state.lengths.fill_(-1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(size, rows, stop_ids)
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(size, rows, stop_ids)
        rows.state.lengths.copy_(lengths)
        return graph


def _power(exponent: int) -> int:
    return int(2**exponent)


def fingerprint(model: nn.Module) -> int:
    """What a captured step depends on: where the weights are, and every plain setting of every module."""
    parts: list[Any] = []
    for module in model.modules():
        parts.append(id(module))
        parts += [p.data_ptr() for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
        parts += [_plain(value) for name, value in module.__dict__.items() if name != "training"]
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
