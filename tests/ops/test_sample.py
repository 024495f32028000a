"""Drawing tokens, on every device: against transformers' own processors, by hand, and by frequency."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from blocks import DTYPES, dtype_id
from tolerances import SIGMAS, assert_exact
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastpeft.ops import SamplingState, sample_


def state(rows: int, device: str, v: int = 0, **values: Any) -> SamplingState:
    """Rows that draw, with the same options for all or a list of them."""
    made = SamplingState.idle(rows, torch.device(device))
    defaults = {"lengths": 5, "top_p": 1.0, "penalty": 1.0, "seed": list(range(rows)), "temperature": 1.0}
    for name, value in {**defaults, **values}.items():
        getattr(made, name).copy_(torch.as_tensor(value))
    if v:
        made.seen = torch.zeros(rows, v, dtype=torch.bool, device=device)
    return made


def none(device: str) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)


@pytest.mark.parametrize("v", [1, 7, 1000, 49_152, 128_256])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_temperature_zero_takes_the_largest(dtype: torch.dtype, v: int, device: str) -> None:
    logits = torch.randn(5, v, device=device).to(dtype)
    drawn = state(5, device, temperature=0.0)
    sample_(logits, drawn, none(device))
    # Of equals the first, which torch.argmax leaves open.
    expected = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    assert_exact(drawn.token, expected)
    exact = logits.double().log_softmax(1).gather(1, expected[:, None])[:, 0]
    assert (drawn.logprob.double() - exact).abs().max() < 1e-4


def test_state_moves_on_but_for_idle_rows(device: str) -> None:
    drawn = state(3, device, 50, lengths=[7, -1, 9], drawn=[2, 3, 0])
    sample_(torch.randn(3, 50, device=device), drawn, none(device))
    assert drawn.lengths.tolist() == [8, -1, 10]
    assert drawn.drawn.tolist() == [3, 3, 1]
    assert drawn.seen is not None and drawn.seen.sum(1).tolist() == [1, 0, 1]
    assert bool(drawn.seen[0, drawn.token[0]])


@pytest.mark.parametrize(
    "cut",
    [{"top_k": 1}, {"top_k": 13}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.7}, {"top_p": 1e-6}, {}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_only_what_transformers_keeps_is_drawn(cut: dict[str, Any], temperature: float, device: str) -> None:
    """Many draws from one row of logits: each falls on a kept token, and likely ones fall as often as they should."""
    v, draws = 300, 4000
    logits = (2 * torch.randn(1, v, device=device)).float()
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    processors += [TopKLogitsWarper(cut["top_k"])] if "top_k" in cut else []
    processors += [TopPLogitsWarper(cut["top_p"])] if "top_p" in cut else []
    kept = processors(torch.zeros(1, 1, dtype=torch.int64, device=device), logits.clone())[0].double()
    share = kept.softmax(0)
    drawn = state(draws, device, temperature=temperature, **cut)
    sample_(logits.expand(draws, -1), drawn, none(device))
    counts = torch.bincount(drawn.token, minlength=v).double()
    assert not bool(counts[kept == -math.inf].any())
    deviation = (counts - draws * share).abs() / (draws * share * (1 - share)).sqrt().clamp_min(1.0)
    assert float(deviation.max()) < SIGMAS


@pytest.mark.parametrize("v", [64, 30_000])
def test_penalty_and_logprob(v: int, device: str) -> None:
    """The penalty is transformers'; log-probabilities are those before it, at the temperature."""
    logits = torch.randn(2, v, device=device)
    drawn = state(2, device, v, temperature=0.0, penalty=[3.0, 1.0])
    seen = torch.cat((logits.argmax(1, keepdim=True), torch.tensor([[3, 40], [3, 40]], device=device)), 1)
    assert drawn.seen is not None
    drawn.seen.scatter_(1, seen, True)
    penalised = RepetitionPenaltyLogitsProcessor(3.0)(seen, logits.clone())
    sample_(logits, drawn, none(device))
    assert drawn.token.tolist() == [int(penalised[0].argmax()), int(logits[1].argmax())]
    warm = state(2, device, temperature=2.0, top_k=5)
    sample_(logits, warm, none(device))
    exact = (logits.double() / 2).log_softmax(1).gather(1, warm.token[:, None])[:, 0]
    assert (warm.logprob.double() - exact).abs().max() < 1e-4


def test_stop_tokens_wait_for_the_least(device: str) -> None:
    logits = torch.zeros(3, 10, device=device)
    logits[:, 4], logits[:, 6], logits[:, 2] = 9.0, 8.0, 7.0
    drawn = state(3, device, temperature=0.0, least=[2, 2, 0], drawn=[1, 2, 0])
    sample_(logits, drawn, torch.tensor([4, 6], device=device))
    assert drawn.token.tolist() == [2, 4, 4]


def test_a_row_draws_the_same_in_any_batch(device: str) -> None:
    logits = torch.randn(6, 5000, device=device)
    options = {"seed": [11, 12, 13, 14, 15, 16], "top_p": 0.9, "drawn": [0, 4, 0, 9, 2**33, 1]}
    together = state(6, device, **options)
    sample_(logits, together, none(device))
    for row in range(6):
        alone = state(1, device, **{name: v[row] if isinstance(v, list) else v for name, v in options.items()})
        sample_(logits[row : row + 1], alone, none(device))
        assert_exact(alone.token, together.token[row : row + 1])
        assert_exact(alone.logprob, together.logprob[row : row + 1])


def test_equal_logits_at_a_cut_are_all_kept(device: str) -> None:
    logits = torch.zeros(400, 8, device=device)
    logits[:, 5] = -9.0
    drawn = state(400, device, top_k=2)
    sample_(logits, drawn, none(device))
    assert set(drawn.token.tolist()) == {0, 1, 2, 3, 4, 6, 7}


@pytest.mark.parametrize(
    "row", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3], ids=["nan", "inf", "none"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_show_in_the_logprob(row: list[float], temperature: float, device: str) -> None:
    drawn = state(1, device, temperature=temperature, top_p=0.5)
    sample_(torch.tensor([row], device=device), drawn, none(device))
    assert math.isnan(float(drawn.logprob)) and 0 <= int(drawn.token) < 3


@pytest.mark.parametrize(("v", "finite"), [(33, (7, 31)), (50_001, (20_000, 50_000))])
def test_minus_infinity_is_never_drawn(v: int, finite: tuple[int, int], device: str) -> None:
    logits = torch.full((200, v), -math.inf, device=device)
    logits[:, finite[0]], logits[:, finite[1]] = 0.0, 1.0
    drawn = state(200, device, temperature=5.0)
    sample_(logits, drawn, none(device))
    assert set(drawn.token.tolist()) == set(finite)
    exact = torch.tensor([0.0, 0.2]).double().log_softmax(0)
    expected = torch.where(drawn.token == finite[0], exact[0], exact[1])
    assert (drawn.logprob.double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_view_of_wider_rows_draws_as_its_copy(temperature: float, dtype: torch.dtype, device: str) -> None:
    """Rows that start anywhere, with what must not be read on both sides."""
    wide = torch.full((4, 20_011), math.nan, device=device, dtype=dtype)
    logits = torch.randn(4, 20_003, device=device).to(dtype)
    wide[:, 3:20_006] = logits
    of_view, of_copy = (state(4, device, temperature=temperature, top_p=0.95) for _ in range(2))
    sample_(wide[:, 3:20_006], of_view, none(device))
    sample_(logits, of_copy, none(device))
    assert_exact(of_view.token, of_copy.token)
    assert_exact(of_view.logprob, of_copy.logprob)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_zeros_of_both_signs_are_equal(temperature: float, device: str) -> None:
    """Once the CUDA version took 0.0 for larger than -0.0, so that a cut at zero dropped one of them."""
    logits = torch.full((100, 9), -5.0, device=device)
    logits[:, 2], logits[:, 6] = -0.0, 0.0
    drawn = state(100, device, temperature=temperature, top_k=1)
    sample_(logits, drawn, none(device))
    assert set(drawn.token.tolist()) == ({2, 6} if temperature else {2})


def test_refuses(device: str) -> None:
    good = state(2, device)
    with pytest.raises(ValueError, match=r"logits have shape \(5,\); they must be \(rows, v\)"):
        sample_(torch.zeros(5, device=device), good, none(device))
    with pytest.raises(ValueError, match=r"stop_ids are torch\.float32"):
        sample_(torch.zeros(2, 5, device=device), good, torch.zeros(1, device=device))
    with pytest.raises(
        ValueError, match=r"temperature is torch.float32 of shape \(2,\); it must be torch.float32, \(3,\)"
    ):
        sample_(torch.zeros(3, 5, device=device), good, none(device))
