"""Dropout that stores no mask: the mask is a function of a seed and the element's row and column."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops import native


def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    number = native.dtype_number("dropout", x.dtype)
    columns = x.shape[-1] if x.dim() > 0 else 1
    rows = x.numel() // columns if columns > 0 else 0
    native.call("dropout", x, x.data_ptr(), out.data_ptr(), number, rows, columns, p, int(seed))
    return out


def _dropout_fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


native.define("dropout(Tensor x, float p, Tensor seed) -> Tensor", _dropout, _dropout_fake)


def new_seed() -> Tensor:
    """Draw a seed from torch's CPU generator: ``()``, int64, on the CPU, so that reading it never waits for a GPU.

    The draw follows ``torch.manual_seed``, checkpointed generator states, and the recomputation of activation
    checkpointing, which restores the generator.
    """
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
