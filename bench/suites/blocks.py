"""The blocks around the big products, all bound by memory: RMSNorm, with the residual add, RoPE, SwiGLU and GeGLU.

Forward and backward are rows of their own. ``torch`` is the formula of transformers in eager, ``liger`` the Triton
kernels. Weights of norms are frozen, as under LoRA, but in the rows with ``weight=trained``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import reference
from bench.case import Calls, Case, Inputs, Suite, Trial, Work
from bench.peers import eager, liger
from fastpeft import ops

_EPS = 1e-5
_TOLERANCE = 1e-2  # bf16 rounds each step by up to 2**-9
_BATCH = 4

Function = Callable[..., Any]  # tensors to a tensor or a pair


@dataclass(frozen=True)
class Block:
    """What is timed, forward or backward.

    Attributes:
        op: opens the row's name.
        sizes: as the row shows them.
        leaves: makes the tensors it takes; those that require a gradient are differentiated by.
        ours: fastpeft's function.
        eager: transformers'.
        liger: Liger's.
        exact: the reference, run in float64.
        forward_bytes: read and written by a forward.
        backward_bytes: by a backward.
        quick: whether the two-minute subset has it.
    """

    op: str
    sizes: dict[str, int | float | str]
    leaves: Callable[[Inputs], list[Tensor]]
    ours: Function
    eager: Function
    liger: Function
    exact: Function
    forward_bytes: int
    backward_bytes: int
    quick: bool


def _as_list(outs: Any) -> list[Tensor]:
    return [outs] if isinstance(outs, Tensor) else list(outs)


def _fresh(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies with the same strides, which require a gradient where the originals do."""
    return [
        tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad) for tensor in tensors
    ]


def _forward(function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _as_list(function(*leaves))


def _gradients(function: Function, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """The backward alone, of a forward that is run here, once."""
    outs = _as_list(function(*leaves))
    needing = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: list(torch.autograd.grad(outs, needing, list(grads), retain_graph=True))


def _prepare(block: Block, backward: bool, inputs: Inputs) -> Trial:
    nbytes = block.backward_bytes if backward else block.forward_bytes
    sets = [block.leaves(inputs) for _ in range(inputs.sets(nbytes))]
    grads: list[list[Tensor]] = [[] for _ in sets]
    if backward:
        grads = [[inputs.randn(*out.shape) for out in _forward(block.ours, leaves)] for leaves in sets]
        if block.op == "rope":  # as attention gives them back: in the order of q and k
            grads = [[grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in pair] for pair in grads]

    def call(function: Function, leaves: Sequence[Tensor], of: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return _gradients(function, leaves, of) if backward else partial(_forward, function, leaves)

    def contender(function: Function) -> Calls:
        return Calls([call(function, leaves, of) for leaves, of in zip(sets, grads, strict=True)])

    def own_copies(function: Function) -> Calls:
        return Calls(
            [call(function, _fresh(leaves), _fresh(of)) for leaves, of in zip(sets, grads, strict=True)],
            outputs=lambda: call(function, _fresh(sets[0]), _fresh(grads[0]))(),
            note="on copies of its own, as it writes over its inputs",
        )

    def exact() -> list[Tensor]:
        return call(block.exact, _fresh(sets[0], torch.float64), _fresh(grads[0], torch.float64))()

    return Trial(
        ours=contender(block.ours),
        peers={"torch": lambda: contender(block.eager), "liger": lambda: own_copies(block.liger)},
        work=Work(bytes=nbytes, memory="copy"),
        check=reference.close_to(exact, _TOLERANCE),
    )


def _norm(m: int, n: int, residual: bool, trained: bool, quick: bool, heads: int = 0) -> Block:
    """A norm of ``(m, n)``; with heads, of ``(m, heads, n)``."""
    shape = (m, heads, n) if heads else (m, n)
    unit = 2 * m * max(1, heads) * n

    def leaves(inputs: Inputs) -> list[Tensor]:
        rows = [inputs.randn(*shape).requires_grad_() for _ in range(2 if residual else 1)]
        return [*rows, inputs.randn(n).requires_grad_(trained)]

    def ours(*tensors: Tensor) -> Any:
        x, *added, weight = tensors
        return ops.rms_norm(x, weight, _EPS, residual=added[0] if added else None)

    def plain(function: Function, fused: Function) -> Function:
        def run(*tensors: Tensor) -> Any:
            return (fused if residual else function)(*tensors, _EPS)

        return run

    def exact_fused(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return reference.rms_norm(x + added, weight, eps), x + added

    sizes: dict[str, int | float | str] = {"m": m, **({"heads": heads} if heads else {}), "n": n}
    if trained:
        sizes["weight"] = "trained"
    return Block(
        op="add_rms_norm" if residual else "rms_norm",
        sizes=sizes,
        leaves=leaves,
        ours=ours,
        eager=plain(eager.rms_norm, eager.add_rms_norm),
        liger=plain(liger.rms_norm, liger.add_rms_norm),
        exact=plain(reference.rms_norm, exact_fused),
        forward_bytes=(4 if residual else 2) * unit,
        backward_bytes=(4 if residual else 3) * unit,
        quick=quick,
    )


def _rope(m: int, heads: int, kv_heads: int, d: int) -> Block:
    tokens = m // _BATCH

    def leaves(inputs: Inputs) -> list[Tensor]:
        q, k = (inputs.randn(_BATCH, tokens, count, d).transpose(1, 2).requires_grad_() for count in (heads, kv_heads))
        phase = torch.outer(
            torch.arange(tokens, device=inputs.device), 1e4 ** -torch.linspace(0, 1, d // 2 + 1)[:-1].to(inputs.device)
        )
        both = torch.cat((phase, phase), -1)[None]
        return [q, k, both.cos().bfloat16(), both.sin().bfloat16()]

    def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)

    nbytes = 2 * 2 * m * (heads + kv_heads) * d + 2 * 2 * tokens * d
    sizes: dict[str, int | float | str] = {"m": m, "heads": f"{heads}/{kv_heads}", "d": d}
    return Block("rope", sizes, leaves, ops.rope, eager.rope, liger.rope, exact, nbytes, nbytes, quick=True)


def _glu(op: str, m: int, n: int, quick: bool) -> Block:
    def leaves(inputs: Inputs) -> list[Tensor]:
        return [inputs.randn(m, n).requires_grad_() for _ in range(2)]

    functions = {"swiglu": (ops.swiglu, eager.swiglu, liger.swiglu), "geglu": (ops.geglu, eager.geglu, liger.geglu)}
    ours, plain, triton = functions[op]
    unit = 2 * m * n
    # The formula of transformers is exact in float64.
    return Block(op, {"m": m, "n": n}, leaves, ours, plain, triton, plain, 3 * unit, 5 * unit, quick)


def _blocks(device_type: str) -> list[Block]:
    if device_type != "cuda":
        return [
            _norm(64, 256, residual=False, trained=True, quick=True),
            _norm(64, 256, residual=True, trained=False, quick=True),
            _rope(64, 4, 2, 32),
            _glu("swiglu", 64, 512, quick=True),
            _glu("geglu", 64, 512, quick=True),
        ]
    return [
        _norm(8192, 4096, residual=False, trained=False, quick=True),
        _norm(8192, 4096, residual=False, trained=True, quick=False),
        _norm(8192, 4096, residual=True, trained=False, quick=True),
        _norm(8192, 4096, residual=True, trained=True, quick=False),
        _norm(8192, 128, residual=False, trained=False, quick=False, heads=40),
        _rope(8192, 32, 8, 128),
        _glu("swiglu", 8192, 4096, quick=False),
        _glu("swiglu", 8192, 14336, quick=True),
        _glu("geglu", 8192, 14336, quick=False),
    ]


def _cases(device_type: str) -> list[Case]:
    return [
        Case(
            f"{block.op}_{direction}",
            block.sizes,
            torch.bfloat16,
            partial(_prepare, block, direction == "bwd"),
            quick=block.quick,
        )
        for block in _blocks(device_type)
        for direction in ("fwd", "bwd")
    ]


SUITE = Suite("blocks", "RMSNorm, RoPE, SwiGLU and GeGLU, forward and backward", ("torch", "liger"), _cases)
