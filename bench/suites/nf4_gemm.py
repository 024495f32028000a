"""Products with an NF4 weight: forward, and the gradient by the input, from one token to a training batch."""

from __future__ import annotations

from functools import partial

import torch

from bench import reference
from bench.case import Calls, Case, Inputs, Suite, Trial, Work
from bench.peers import bnb, dense
from bench.timing import backward_only
from fastpeft.ops import nf4_linear, nf4_linear_plan, nf4_quantize

_SHAPES = {"cuda": ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)), "cpu": ((256, 512),)}
_TOKENS = {"cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192), "cpu": (1, 16, 64)}
_QUICK = {(1, 4096), (16, 4096), (256, 4096), (4096, 4096), (16, 256), (64, 256)}
_TOLERANCE = 1e-2


def _prepare(m: int, n: int, k: int, backward: bool, inputs: Inputs) -> Trial:
    io_bytes = 2 * m * (n + k)
    sets = inputs.sets(n * k // 2 + io_bytes)
    ws = [inputs.randn(n, k, scale=k**-0.5) for _ in range(sets)]
    packed = [nf4_quantize(w) for w in ws]
    # The dense peer gets the decoded weight, so that all contenders compute the same product.
    decoded = [reference.nf4_decode(w).to(torch.bfloat16) for w in packed]
    xs = [inputs.randn(m, k).requires_grad_(backward) for _ in range(sets)]
    work = Work(bytes=packed[0].nbytes + io_bytes, flops=2 * m * n * k)
    if not backward:
        return Trial(
            ours=Calls(
                [partial(nf4_linear, x, w) for x, w in zip(xs, packed, strict=True)],
                note=nf4_linear_plan(xs[0], packed[0]),
            ),
            peers={"dense": lambda: dense.linear(xs, decoded), "bnb": lambda: bnb.linear(xs, ws)},
            work=work,
            check=reference.close_to(lambda: [xs[0].double() @ decoded[0].double().T], _TOLERANCE),
        )
    dys = [inputs.randn(m, n, scale=n**-0.5 * k**0.5) for _ in range(sets)]
    return Trial(
        ours=Calls(
            [backward_only(partial(nf4_linear, x, w), [x], dy) for x, w, dy in zip(xs, packed, dys, strict=True)],
            note=nf4_linear_plan(dys[0], packed[0], transposed=True),
        ),
        peers={"dense": lambda: dense.linear_dx(xs, decoded, dys), "bnb": lambda: bnb.linear_dx(xs, ws, dys)},
        work=work,
        check=reference.close_to(lambda: [dys[0].double() @ decoded[0].double()], _TOLERANCE),
    )


def _cases(device_type: str) -> list[Case]:
    return [
        Case(
            "nf4_gemm_dx" if backward else "nf4_gemm",
            {"m": m, "n": n, "k": k},
            torch.bfloat16,
            partial(_prepare, m, n, k, backward),
            quick=(m, n) in _QUICK,
        )
        for n, k in _SHAPES[device_type]
        for backward in (False, True)
        for m in _TOKENS[device_type]
    ]


SUITE = Suite("nf4_gemm", "products with an NF4 weight, forward and by the input", ("dense", "bnb"), _cases)
