"""What counts as equal: the policy of the whole suite, so that no test invents a number.

exact        codes, round trips, resume, two equal runs: the same bits
ratio        error against float64 at most twice that of plain torch in the same dtype
optimizer    a run of AdamW against torch's, in float32
statistical  quantisation error against its expectation, mean + 7 sigma
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RATIO = 2.0
OPTIMIZER = 1e-5
SIGMAS = 7.0


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference; NaN never passes a comparison."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    return float((out - reference).norm() / reference.norm().clamp_min(1e-300))


def assert_exact(out: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits (minus zero equals zero)."""
    assert out.dtype == expected.dtype, f"dtype {out.dtype} instead of {expected.dtype}"
    assert out.shape == expected.shape, f"shape {tuple(out.shape)} instead of {tuple(expected.shape)}"
    differing = int((out.cpu() != expected.cpu()).sum())
    assert differing == 0, f"{differing} of {out.numel()} elements differ"


def assert_ratio(out: Tensor, plain: Tensor, reference: Tensor) -> None:
    """``out`` is as near to the float64 ``reference`` as ``plain`` torch in the same dtype, within a factor."""
    assert out.dtype == plain.dtype and out.shape == plain.shape, (out.dtype, out.shape, plain.dtype, plain.shape)
    error, allowed = relative_error(out, reference), RATIO * relative_error(plain, reference)
    floor = 4 * torch.finfo(out.dtype).eps / math.sqrt(max(1, out.numel()))  # plain torch may be exact by luck
    assert error <= max(allowed, floor), f"error {error:.3e}; plain torch allows {allowed:.3e}"


def assert_optimizer(out: Tensor, expected: Tensor) -> None:
    """Parameters after a run of two AdamW implementations agree."""
    error = relative_error(out, expected)
    assert error <= OPTIMIZER, f"relative error {error:.3e}, allowed {OPTIMIZER:.0e}"


def assert_statistical(errors: Tensor, mean: float) -> None:
    """The mean of independent ``errors`` does not exceed ``mean`` by more than seven of its standard deviations."""
    observed, sigma = float(errors.mean()), float(errors.std()) / math.sqrt(errors.numel())
    assert observed <= mean + SIGMAS * sigma, f"mean error {observed:.5f}, expected at most {mean:.5f}"
