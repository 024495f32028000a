"""DoRA's trained lengths, for linear layers and embeddings.

Each row of ``w + s B A`` (n, k) is scaled to a trained length m: by ``m / ||w + s B A||``, the norm a constant in
backward. The norms are found without the sum: ``||w||^2 + 2 s <w A^T, B> + s^2 <B (A A^T), B>``, row by row. An
embedding counts as the layer whose weight is its table transposed: a length for each of the d columns of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Magnitude(nn.Module):
    """The trained lengths ``(n,)`` of one adapter, fp32, and the squared row norms of its base.

    Args:
        weight: the base, ``(n, k)``.
    Source:
        DoRA, arXiv 2402.09353, section 4.3.
    """

    base_squares: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        lengths = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        self.weight = nn.Parameter(lengths)
        self.register_buffer("base_squares", lengths.clone(), persistent=False)
        self.follow(weight)

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Take the squared row norms of the base ``(n, k)`` anew."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.base_squares.copy_(torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square())

    @torch.no_grad()
    def norms(self, wa: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Row norms ``(n,)`` of ``w + scale b a``, fp32.

        Args:
            wa: ``w a^T``, ``(n, r)``.
            a: ``(r, k)``.
            b: ``(n, r)``.
            scale: factor of ``b a``.
        """
        cross = (wa.to(b.dtype) * b).sum(1)
        square = ((b @ (a @ a.t())) * b).sum(1)
        return (self.base_squares + 2 * scale * cross + scale**2 * square).clamp(min=1e-30).sqrt()

    def at_length(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """``weight + scale b a`` with its rows at their lengths, in the dtype of ``weight``, which is kept."""
        whole = torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scale)
        return whole.mul_((self.weight / torch.linalg.norm(whole, dim=1))[:, None])
