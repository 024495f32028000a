"""Quantising a bf16 weight to double-quantised NF4, and decoding it again; both are bound by memory."""

from __future__ import annotations

from functools import partial

import torch

from bench import reference
from bench.case import Calls, Case, Inputs, Suite, Trial, Work
from bench.peers import bnb
from fastpeft.ops import nf4_dequantize, nf4_quantize

_SHAPES = {"cuda": ((4096, 4096), (14336, 4096), (28672, 8192)), "cpu": ((256, 512), (512, 1024))}
_QUICK = ((4096, 4096), (28672, 8192), (256, 512))
# Decoding to bf16 rounds by up to 2**-9; a wrong code or scale is off by percents.
_TOLERANCE = 3e-3


def _prepare_quantize(n: int, k: int, inputs: Inputs) -> Trial:
    ws = [inputs.randn(n, k) for _ in range(inputs.sets(2 * n * k))]
    return Trial(
        ours=Calls([partial(nf4_quantize, w) for w in ws], outputs=lambda: [reference.nf4_decode(nf4_quantize(ws[0]))]),
        peers={"bnb": lambda: bnb.quantize(ws)},
        work=Work(bytes=2 * n * k + nf4_quantize(ws[0]).nbytes),
        check=reference.close_to(lambda: [reference.nf4_round_trip(ws[0])], _TOLERANCE),
    )


def _prepare_dequantize(n: int, k: int, inputs: Inputs) -> Trial:
    ws = [inputs.randn(n, k) for _ in range(inputs.sets(2 * n * k))]
    packed = [nf4_quantize(w) for w in ws]
    return Trial(
        ours=Calls([partial(nf4_dequantize, w) for w in packed]),
        peers={"bnb": lambda: bnb.dequantize(ws)},
        work=Work(bytes=2 * n * k + packed[0].nbytes, memory="copy"),
        check=reference.close_to(lambda: [reference.nf4_round_trip(ws[0])], _TOLERANCE),
    )


def _cases(device_type: str) -> list[Case]:
    return [
        Case(op, {"n": n, "k": k}, torch.bfloat16, partial(prepare, n, k), quick=(n, k) in _QUICK)
        for op, prepare in (("nf4_quantize", _prepare_quantize), ("nf4_dequantize", _prepare_dequantize))
        for n, k in _SHAPES[device_type]
    ]


SUITE = Suite("nf4_quant", "NF4 quantise and dequantise, double-quantised, block 64", ("bnb",), _cases)
