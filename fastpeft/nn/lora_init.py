"""How a LoRA adapter begins.

The plain starts leave the layer's output as it is by ``B = 0``. PiSSA and OLoRA begin with the weight's principal part
``B0 A0`` in the adapter, and take it out of the base. Here the base stays as it is (other adapters use it, and it may
be 4-bit): the layer keeps the two starting factors and computes ``w + s (B A - B0 A0)``, a low-rank update of rank 2 r
that stock PEFT reads. LoftQ begins with what quantisation lost, ``w - dequant(quant(w))``.

Source: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775; LoftQ, arXiv 2310.08659.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.ops import NF4Weight, nf4_dequantize, nf4_quantize

_PISSA_NITER = "pissa_niter_"
STARTS = "True, False, 'gaussian', 'pissa', 'pissa_niter_N', 'olora' or 'loftq'"


def is_known_start(how: bool | str) -> bool:
    """Whether ``init_lora_weights`` names a start that this version has."""
    if how in (True, False, "gaussian", "pissa", "olora", "loftq"):
        return True
    return isinstance(how, str) and how.startswith(_PISSA_NITER) and how[len(_PISSA_NITER) :].isdigit()


def begins_in_base(how: bool | str) -> bool:
    """Whether the start takes a part of the weight into the adapter, so that it has starting factors."""
    return isinstance(how, str) and (how == "olora" or how.startswith("pissa"))


def plain_start(n: int, k: int, r: int, how: bool | str, experts: int = 1) -> tuple[nn.Linear, nn.Linear]:
    """A ``(r, k)`` and B ``(n, r)`` on the CPU, drawn in PEFT's order: one seed gives the same start in both libraries.

    Of several experts A is ``(experts r, k)`` and B ``(n, r experts)``, drawn as one.

    Args:
        n: output features.
        k: input features.
        r: rank.
        how: True (A uniform as in ``nn.Linear``, B zero), "gaussian" (A normal with standard deviation 1 / r, B zero),
            or False (A and B both as in ``nn.Linear``); any other start is drawn as True.
        experts: how many there are.
    """
    a = nn.Linear(k, experts * r, bias=False, device="cpu", dtype=torch.float32)
    b = nn.Linear(experts * r, n, bias=False, device="cpu", dtype=torch.float32)
    if how == "gaussian":
        nn.init.normal_(a.weight, std=1 / r)
    elif how:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    if how:
        nn.init.zeros_(b.weight)
    return a, b


@torch.no_grad()
def principal_start(weight: Tensor, r: int, scale: float, how: str) -> tuple[Tensor, Tensor]:
    """A and B whose scaled product is the principal part of a weight (PiSSA), or of its QR decomposition (OLoRA).

    Args:
        weight: ``(n, k)``, fp32.
        r: rank.
        scale: of the adapter.
        how: "pissa", "pissa_niter_N" (randomised SVD of N iterations) or "olora".
    Raises:
        UserError: the rank is greater than the weight's.
    """
    _check_rank(weight, r, how)
    if how == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if how == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(how[len(_PISSA_NITER) :]))
        vh = v.t()
    root = (s / scale).sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


@torch.no_grad()
def loftq_start(
    weight: Tensor, dtype: torch.dtype, r: int, scale: float, iterations: int
) -> tuple[NF4Weight, Tensor, Tensor]:
    """Split a weight in turns into an NF4 part and a low-rank part of what is left.

    Args:
        weight: ``(n, k)``, fp32.
        dtype: that the weight stands for.
        r: rank.
        scale: of the adapter.
        iterations: 1 gives the NF4 part that ``fastpeft.quantize`` gives.
    Returns:
        The NF4 weight, A and B.
    Raises:
        UserError: the rank is greater than the weight's.
    """
    _check_rank(weight, r, "loftq")
    low_rank = torch.zeros_like(weight)
    for _ in range(iterations):
        packed = nf4_quantize((weight - low_rank).to(dtype))
        u, s, vh = torch.linalg.svd(weight - nf4_dequantize(packed, torch.float32), full_matrices=False)
        root = (s[:r] / scale).sqrt()
        a, b = (root[:, None] * vh[:r]).contiguous(), (u[:, :r] * root).contiguous()
        low_rank = scale * (b @ a)
    return packed, a, b


def _check_rank(weight: Tensor, r: int, how: str) -> None:
    if r > min(weight.shape):
        raise UserError(
            f"init_lora_weights='{how}': r={r} is greater than the smaller side of a weight of {tuple(weight.shape)}; "
            f"use r of at most {min(weight.shape)}, or rank_pattern for this layer"
        )
