"""Products of rows that are sorted by expert with dense weights: the experts themselves, or adapters beside them.

On CUDA, in a 16-bit type, torch's grouped product takes all experts at once; elsewhere one expert is multiplied after
the other, which waits for the device to learn the numbers of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.nf4 import autocast

_ALIGNED = 8  # elements of 16 bits in the 16 bytes that torch's product wants rows to begin at


def linear_experts(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row by the weight of its expert: ``y[i] = x[i] @ w[e].T``, differentiable in ``x`` and ``w``.

    Args:
        x: ``(rows, k)``, sorted by expert; under autocast it is cast to autocast's dtype.
        w: ``(experts, n, k)``; cast to the dtype of ``x``.
        ends: ``(experts,)``, int32: where each expert's rows end, ascending, the last at ``rows``.
    Returns:
        ``(rows, n)``, dtype of ``x``.
    Raises:
        ValueError: shapes or devices that do not fit.
    """
    if w.dim() != 3 or x.dim() != 2 or x.shape[1] != w.shape[2] or tuple(ends.shape) != (w.shape[0],):
        raise ValueError(
            f"linear_experts: x is {tuple(x.shape)}, w {tuple(w.shape)}, ends {tuple(ends.shape)}; they must be "
            "(rows, k), (experts, n, k), (experts,)"
        )
    if not x.device == w.device == ends.device:
        raise ValueError(f"linear_experts: x is on {x.device}, w on {w.device}, ends on {ends.device}; move them")
    x = autocast(x)
    w = w.to(x.dtype)
    if x.is_cuda and x.dtype.itemsize == 2 and hasattr(F, "grouped_mm"):
        return _together(x, w, ends)
    parts = [0, *ends.tolist()]
    each = [F.linear(x[begin:end], weight) for begin, end, weight in zip(parts, parts[1:], w, strict=False)]
    return torch.cat(each)


def _together(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    _, n, k = w.shape
    if k % _ALIGNED or n % _ALIGNED:  # such as an odd rank: zeros add nothing
        w = F.pad(w, (0, -k % _ALIGNED, 0, -n % _ALIGNED))
        x = F.pad(x, (0, -k % _ALIGNED))
    y: Tensor = F.grouped_mm(x, w.transpose(1, 2), offs=ends)
    return y[:, :n] if n % _ALIGNED else y
