"""Plain torch matmuls over a dense weight: what a layer costs without quantisation and without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from bench.case import Calls
from bench.timing import backward_only, forward_backward


def linear(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Calls:
    """Forward products."""
    return Calls([partial(torch_linear, x, w) for x, w in zip(xs, ws, strict=True)])


def linear_dx(xs: Sequence[Tensor], ws: Sequence[Tensor], dys: Sequence[Tensor]) -> Calls:
    """Gradients by the input, without the forward."""
    sets = zip(xs, ws, dys, strict=True)
    return Calls([backward_only(partial(torch_linear, x, w), [x], dy) for x, w, dy in sets])


def frozen_step(xs: Sequence[Tensor], ws: Sequence[Tensor], dys: Sequence[Tensor]) -> Calls:
    """Forward and gradient by the input over a frozen weight: the floor of an adapter step."""
    sets = zip(xs, ws, dys, strict=True)
    return Calls([forward_backward(partial(torch_linear, x, w), [x], dy) for x, w, dy in sets])


def grouped(xs: Sequence[Tensor], ws: Sequence[Tensor], ends: Tensor, backward: bool) -> Calls:
    """Products of rows sorted by expert, forward or by the input, without autograd."""
    weights = ws if backward else [w.transpose(1, 2) for w in ws]
    return Calls([partial(torch.nn.functional.grouped_mm, x, w, offs=ends) for x, w in zip(xs, weights, strict=True)])
