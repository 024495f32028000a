"""bitsandbytes: NF4 with double quantisation, block size 64, and its AdamWs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Calls, require
from bench.timing import backward_only, forward_backward


@contextlib.contextmanager
def _ordered(device: torch.device) -> Iterator[None]:
    """Order the default stream, on which bitsandbytes quantises whatever the caller's stream is, with the current one.

    Without it a weight was read before it was written, and a timed call ended before its work began.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)


def _pack(w: Tensor) -> tuple[Tensor, Any]:
    """Codes and quantisation state, as `Linear4bit` makes them with ``compress_statistics=True``."""
    functional = require("bitsandbytes").functional
    with _ordered(w.device):
        codes, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    return codes, state


def quantize(ws: Sequence[Tensor]) -> Calls:
    """Quantise bf16 weights."""
    functional = require("bitsandbytes").functional
    return Calls(
        [partial(_pack, w) for w in ws],
        outputs=lambda: [functional.dequantize_4bit(*_pack(ws[0]))],
        eager_because="quantize_4bit copies its tables from the host on every call",
    )


def dequantize(ws: Sequence[Tensor]) -> Calls:
    """Decode to the dtype the weights had."""
    functional = require("bitsandbytes").functional
    return Calls([partial(functional.dequantize_4bit, *_pack(w)) for w in ws])


def _matmuls(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    matmul_4bit = require("bitsandbytes").matmul_4bit
    packed = [_pack(w) for w in ws]
    return [partial(matmul_4bit, x, codes.t(), quant_state=state) for x, (codes, state) in zip(xs, packed, strict=True)]


def linear(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Calls:
    """Forward products; inputs that need no gradient take its inference kernels."""
    return Calls(_matmuls(xs, ws))


def linear_dx(xs: Sequence[Tensor], ws: Sequence[Tensor], dys: Sequence[Tensor]) -> Calls:
    """Gradients by the input, without the forward."""
    sets = zip(_matmuls(xs, ws), xs, dys, strict=True)
    return Calls([backward_only(matmul, [x], dy) for matmul, x, dy in sets])


def frozen_step(xs: Sequence[Tensor], ws: Sequence[Tensor], dys: Sequence[Tensor]) -> Calls:
    """Forward and gradient by the input over a frozen weight: what an adapter adds its work to."""
    sets = zip(_matmuls(xs, ws), xs, dys, strict=True)
    return Calls([forward_backward(matmul, [x], dy) for matmul, x, dy in sets])


def grouped(xs: Sequence[Tensor], ws: Sequence[Tensor], ends: Tensor, backward: bool) -> Calls:
    """Products of rows sorted by expert: all experts decoded, as its parametrised weights are, and torch's product."""
    dequantize_4bit = require("bitsandbytes").functional.dequantize_4bit

    def product(x: Tensor, codes: Tensor, state: Any) -> Tensor:
        w = dequantize_4bit(codes, state)
        return torch.nn.functional.grouped_mm(x, w if backward else w.transpose(1, 2), offs=ends)

    return Calls([partial(product, x, *_pack(w)) for x, w in zip(xs, ws, strict=True)])


def linear4bit(w: Tensor) -> torch.nn.Module:
    """A `Linear4bit` without bias that holds this weight, quantised on its device."""
    nn = require("bitsandbytes").nn
    n, k = w.shape
    layer: torch.nn.Module = nn.Linear4bit(
        k, n, bias=False, compute_dtype=w.dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    weight = nn.Params4bit(w, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=64)
    with _ordered(w.device):
        layer.weight = weight.to(w.device)
    return layer


def adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    """One of its AdamWs, by the name of its class; its steps, which run on the default stream, in order with ours."""

    def make(params: Sequence[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
        params = list(params)
        optimizer: torch.optim.Optimizer = getattr(require("bitsandbytes").optim, name)(params, **hyper)
        step = optimizer.step

        def ordered_step() -> None:
            with _ordered(params[0].device):
                step()

        optimizer.step = ordered_step  # type: ignore[method-assign, assignment]
        return optimizer

    return make
