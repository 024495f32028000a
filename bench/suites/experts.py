"""Products of a mixture's experts with NF4 weights, forward and by the input, from a decoding step to a batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench import reference
from bench.case import Calls, Case, Inputs, Suite, Trial, Work
from bench.peers import bnb, dense
from fastpeft.ops import nf4_linear_experts_plan, nf4_quantize

# Experts, how many a token has, and (n, k): Qwen3-30B-A3B's and Mixtral 8x7B's.
_SHAPES = {
    "cuda": ((128, 8, 1536, 2048), (128, 8, 2048, 768), (8, 2, 28672, 4096), (8, 2, 4096, 14336)),
    "cpu": ((4, 2, 64, 128),),
}
_TOKENS = {"cuda": (1, 16, 64, 1024, 8192), "cpu": (1, 16)}
_QUICK = {(1, 1536), (1024, 1536), (8192, 1536), (8192, 28672), (1, 64), (16, 64)}
_TOLERANCE = 1e-2


def _ends(tokens: int, experts: int, chosen: int, inputs: Inputs) -> Tensor:
    """Where experts' tokens end when every token chooses at random."""
    scores = inputs.randn(tokens, experts).float()
    ids = scores.topk(chosen).indices.flatten()
    return torch.bincount(ids, minlength=experts).cumsum(0).int()


def _prepare(tokens: int, experts: int, chosen: int, n: int, k: int, backward: bool, inputs: Inputs) -> Trial:
    rows = tokens * chosen
    ends = _ends(tokens, experts, chosen, inputs)
    hit = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())  # whose weights are read
    io_bytes = 2 * rows * (n + k)
    sets = inputs.sets(hit * n * k // 2 + io_bytes)
    ws = [inputs.randn(experts, n, k, scale=k**-0.5) for _ in range(sets)]
    packed = [nf4_quantize(w) for w in ws]
    decoded = [reference.nf4_decode(w).to(torch.bfloat16) for w in packed]
    xs = [inputs.randn(rows, n if backward else k, scale=n**-0.5 * k**0.5 if backward else 1.0) for _ in range(sets)]
    product = torch.ops.fastpeft.nf4_linear_experts
    calls = [partial(product, x, ends, *w.operands, n, k, backward) for x, w in zip(xs, packed, strict=True)]

    def exact() -> list[Tensor]:
        parts = zip(xs[0].tensor_split(ends[:-1].long().cpu()), decoded[0], strict=True)
        return [torch.cat([x.double() @ (w if backward else w.T).double() for x, w in parts])]

    return Trial(
        ours=Calls(calls, note=nf4_linear_experts_plan(xs[0], packed[0], backward)),
        peers={
            "dense": lambda: dense.grouped(xs, decoded, ends, backward),
            "bnb": lambda: bnb.grouped(xs, ws, ends, backward),
        },
        work=Work(bytes=hit * packed[0].nbytes // experts + io_bytes, flops=2 * rows * n * k),
        check=reference.close_to(exact, _TOLERANCE),
    )


def _cases(device_type: str) -> list[Case]:
    return [
        Case(
            "experts_dx" if backward else "experts",
            {"tokens": tokens, "experts": experts, "n": n, "k": k},
            torch.bfloat16,
            partial(_prepare, tokens, experts, chosen, n, k, backward),
            quick=(tokens, n) in _QUICK,
        )
        for experts, chosen, n, k in _SHAPES[device_type]
        for backward in (False, True)
        for tokens in _TOKENS[device_type]
        if tokens > 64 or not backward  # few tokens are decoded, not trained on
    ]


SUITE = Suite("experts", "products of a mixture's experts with NF4 weights", ("dense", "bnb"), _cases)
