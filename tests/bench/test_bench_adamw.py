"""The check of the optimizer suite notices each part of AdamW that could be left out."""

from __future__ import annotations

import pytest
import torch

from bench.case import Inputs
from bench.suites import adamw, paged_adamw
from fastpeft.optim import AdamW

WRONG = {
    "no decay": {"weight_decay": 0.0},
    "another learning rate": {"lr": 1.05e-2},
    "another beta1": {"betas": (0.8, 0.999)},
    "another beta2": {"betas": (0.9, 0.99)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_right_update_passes(dtype: torch.dtype) -> None:
    trial = adamw._prepare([(33, 65), (7,)], dtype, Inputs(torch.device("cpu"), seed=1))
    assert trial.check.passes(trial.check.error(trial.ours.checkable()))


@pytest.mark.parametrize("share", [0, 100])
@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (8, torch.bfloat16)])
def test_the_paged_update_passes_and_its_work_is_counted(bits: int, dtype: torch.dtype, share: int) -> None:
    trial = paged_adamw._prepare(10_000, dtype, bits, share, Inputs(torch.device("cpu"), seed=1))
    assert trial.check.passes(trial.check.error(trial.ours.checkable()))
    state = round(10_000 * (8 if bits == 32 else 2.03125))
    assert trial.work.link_bytes == (state if share == 0 else 0)
    assert trial.work.bytes == 30_000 * dtype.itemsize + state * (4 if share == 0 else 2)


def test_the_8_bit_update_passes() -> None:
    trial = adamw._prepare([(64, 65)], torch.bfloat16, Inputs(torch.device("cpu"), seed=1), kind=adamw.EIGHT_BIT)
    assert trial.check.passes(trial.check.error(trial.ours.checkable()))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_update_does_not(name: str) -> None:
    inputs = Inputs(torch.device("cpu"), seed=1)
    start, grads = [inputs.randn(4096, dtype=torch.float32, scale=0.2)], [inputs.randn(4096, dtype=torch.float32)]
    calls = adamw.contender(lambda params, **hyper: AdamW(params, **{**hyper, **WRONG[name]}), start, grads)
    assert adamw.update_error(start, grads, calls.checkable()) > adamw._TOLERANCES[torch.float32]


def test_an_update_that_stops_before_the_tail_does_not_pass() -> None:
    inputs = Inputs(torch.device("cpu"), seed=1)
    start, grads = [inputs.randn(4096, dtype=torch.float32, scale=0.2)], [inputs.randn(4096, dtype=torch.float32)]
    (out,) = adamw.contender(AdamW, start, grads).checkable()
    out[-8:] = start[0][-8:]
    assert adamw.update_error(start, grads, [out]) > adamw._TOLERANCES[torch.float32]
