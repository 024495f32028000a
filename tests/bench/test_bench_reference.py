"""The references are held against values worked out by hand, and against torch."""

from __future__ import annotations

import math

import pytest
import torch

from bench import reference
from fastpeft.ops import NF4Weight, nf4_quantize


def test_dynamic_map_is_the_papers() -> None:
    levels = reference.dynamic_map()
    assert levels.numel() == 256
    assert levels.diff().gt(0).all()
    assert levels[-1] == 1.0
    assert levels[0].item() == pytest.approx(-(1 - 0.9 / 128), rel=1e-6)
    assert 0.0 in levels


def test_decode_of_a_weight_worked_out_by_hand() -> None:
    # Two blocks of 32: codes 0xF7 are the levels 1.0 and 0.0; scales 2 and 3.
    weight = NF4Weight(
        codes=torch.full((32, 1), 0xF7, dtype=torch.uint8),
        absmax=torch.tensor([2.0, 3.0]),
        nested_absmax=None,
        nested_map=None,
        offset=None,
        shape=(2, 32),
        block_size=32,
        dtype=torch.float32,
    )
    decoded = reference.nf4_decode(weight)
    assert decoded[0].tolist() == [2.0, 0.0] * 16
    assert decoded[1].tolist() == [3.0, 0.0] * 16


@pytest.mark.parametrize("shape", [(64, 64), (300, 192), (3, 35)], ids=str)
def test_round_trip_is_what_the_packed_weight_decodes_to(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    assert reference.relative_error(reference.nf4_decode(nf4_quantize(w)), reference.nf4_round_trip(w)) < 1e-3


def test_round_trip_keeps_levels_and_zeros() -> None:
    levels = torch.tensor(reference.NF4_LEVELS).repeat(4)
    w = torch.stack([levels, levels])
    torch.testing.assert_close(reference.nf4_round_trip(w), w, rtol=1e-6, atol=1e-6)
    assert reference.nf4_round_trip(torch.zeros(2, 64)).eq(0).all()


def test_adamw_agrees_with_torch_over_differing_gradients() -> None:
    start, g = torch.randn(100, dtype=torch.float64), torch.randn(100, dtype=torch.float64)
    grads = [g, -0.5 * g, 2 * g]
    p = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    out = reference.adamw(start, grads, 1e-3, (0.9, 0.999), 1e-8, 1e-2)
    torch.testing.assert_close(out, p.detach(), rtol=1e-12, atol=1e-12)


def lora_pairs(p: float, applied: float) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """Output without dropout and the adapter's share; and the output with dropout at the rate ``applied``."""
    x, a, b = torch.randn(128, 256), torch.randn(16, 256) / 16, torch.randn(64, 16) / 4
    base = torch.randn(128, 64)
    share = x @ a.T @ b.T
    dropped = torch.nn.functional.dropout(x, applied) @ a.T @ b.T
    return [(base + share, share)], [base + dropped]


def test_dropout_noise_accepts_the_rate_and_nothing_else() -> None:
    torch.manual_seed(5)
    for applied, passes in ((0.05, True), (0.0, False), (0.1, False), (0.02, False)):
        pairs, outputs = lora_pairs(0.05, applied)
        check = reference.dropout_noise(lambda pairs=pairs: pairs, 0.05, 0.15)
        assert check.passes(check.error(outputs)) == passes, applied
    pairs, (out,) = lora_pairs(0.05, 0.05)
    check = reference.dropout_noise(lambda: pairs, 0.05, 0.15)
    assert not check.passes(check.error([out * math.nan]))
    assert not check.passes(check.error([out[:1]]))
    assert not check.passes(check.error([]))


def test_one_nan_among_many_outputs_does_not_pass() -> None:
    good, bad = torch.ones(4), torch.full((4,), math.nan)
    for order in ([good, bad], [bad, good]):
        check = reference.close_to(lambda: [torch.ones(4), torch.ones(4)], 1e-3)
        assert not check.passes(check.error(order))
