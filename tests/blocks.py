"""The formulas of transformers in plain torch, for tests of the model blocks: any dtype, float64 as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerances import assert_exact, assert_ratio
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    """LlamaRMSNorm, or Gemma's without ``cast_first``."""
    wide = x if x.dtype == torch.float64 else x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        return (n.to(x.dtype) * (weight.to(wide.dtype) + offset).to(x.dtype)).to(x.dtype)
    return (n * (weight.to(wide.dtype) + offset)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """apply_rotary_pos_emb, with partial rotary as in Phi-3."""
    rotary = cos.shape[-1]
    turned, passed = x[..., :rotary], x[..., rotary:]
    half = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), -1)
    return torch.cat((turned * cos.unsqueeze(1) + half * sin.unsqueeze(1), passed), -1)


def glu(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    functional = torch.nn.functional
    if kind == "swiglu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate=kind.removeprefix("geglu-")) * up


def compare(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    exact: Callable[..., Any] | None = None,
) -> None:
    """Outputs and the gradients of all inputs against ``plain`` in the inputs' dtypes and ``exact`` in float64.

    Gradients of the outputs are drawn here; two runs must give the same bits.
    """
    exact = exact or plain

    def run(function: Callable[..., Any], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        outs = as_list(function(*leaves))
        needing = [leaf for leaf in leaves if leaf.requires_grad]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, needing, list(grads))]

    leaves = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in inputs]
    grads = [torch.randn_like(out) for out in as_list(ours(*leaves))]
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in inputs]
    first = run(ours, leaves, grads)
    plains, exacts = run(plain, leaves, grads), run(exact, wide, [grad.double() for grad in grads])
    for out, again, of_plain, reference in zip(first, run(ours, leaves, grads), plains, exacts, strict=True):
        assert_exact(again, out)
        assert_ratio(out, of_plain, reference)


def as_list(outs: Any) -> list[Tensor]:
    return list(outs) if isinstance(outs, tuple) else [outs]
