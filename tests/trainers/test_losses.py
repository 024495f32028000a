"""Losses: values worked out by hand, and those of TRL (record_trl_losses.py says how they were made)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.trainers.losses import (
    DPO_LOSSES,
    LENGTH_NORMALISED,
    dpo_loss,
    entropy,
    gae,
    group_advantages,
    kl_estimate,
    masked_mean,
    ppo_policy_loss,
    ppo_value_loss,
    reward_loss,
    whiten,
)

TRL = json.loads(Path(__file__).with_name("trl_losses.json").read_text())
TRL_NAMES = sorted(set(TRL["preferences"]["dpo"]) - {"sft"})


def close(out: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(out, torch.as_tensor(expected, dtype=out.dtype), rtol=1e-5, atol=1e-6)


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x))


# Preferences.


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    [
        # c = log ratio of chosen = 2, r = of rejected = -1, beta = 0.5, so beta (c - r) = 1.5
        ("sigmoid", 0.0, -log_s(1.5)),
        ("sigmoid_norm", 0.0, -log_s(1.5)),
        ("conservative", 0.1, -0.9 * log_s(1.5) - 0.1 * log_s(-1.5)),
        ("hinge", 0.0, 0.0),
        ("ipo", 0.0, (3.0 - 1.0) ** 2),
        ("robust", 0.1, (-0.9 * log_s(1.5) + 0.1 * log_s(-1.5)) / 0.8),
        ("nca_pair", 0.0, -log_s(1.0) - 0.5 * log_s(-1.0) - 0.5 * log_s(0.5)),
        ("bco_pair", 0.0, -log_s(1.0) - log_s(0.5)),
        ("sppo_hard", 0.0, (2.0 - 1.0) ** 2 + (-1.0 + 1.0) ** 2),
        ("apo_zero", 0.0, 1 - math.exp(log_s(1.0)) + math.exp(log_s(-0.5))),
        ("apo_down", 0.0, math.exp(log_s(1.0)) + 1 - math.exp(log_s(1.5))),
        # the batch is this pair alone: mean(c) = 2 and mean(r) = -1, floored at 0
        ("kto_pair", 0.0, 0.5 * (1 - math.exp(log_s(1.0)) + 1 - math.exp(log_s(1.5)))),
        ("aot", 0.0, -log_s(1.5)),
        ("aot_unpaired", 0.0, -log_s(1.5)),
    ],
)
def test_a_pair_by_hand(loss_type: str, smoothing: float, expected: float) -> None:
    """Policy -4 and -7, reference -6 and -6; beta 0.5."""
    numbers = (torch.tensor([x]) for x in (-4.0, -7.0, -6.0, -6.0))
    loss, chosen, rejected = dpo_loss(*numbers, beta=0.5, loss_type=loss_type, label_smoothing=smoothing)
    close(loss, [expected])
    close(chosen, [1.0])
    close(rejected, [-0.5])


def recorded_logps(loss_type: str) -> list[torch.Tensor]:
    recorded = TRL["preferences"]
    lengths = torch.tensor(recorded["lengths"]) if loss_type in LENGTH_NORMALISED else 1
    sums = [torch.tensor(recorded[key]).sum(1) / lengths for key in ("logps", "ref_logps")]
    return [sums[0][:4], sums[0][4:], sums[1][:4], sums[1][4:]]


@pytest.mark.parametrize("loss_type", TRL_NAMES)
def test_preferences_as_in_trl(loss_type: str) -> None:
    recorded = TRL["preferences"]
    smoothing = recorded["label_smoothing"].get(loss_type, 0.0)
    loss, _, _ = dpo_loss(*recorded_logps(loss_type), recorded["beta"], loss_type, smoothing)
    assert loss.shape == (4,)
    close(loss.mean(), recorded["dpo"][loss_type])


def test_sft_term_as_in_trl() -> None:
    """The mean over all tokens of the chosen completions, as the trainer takes it."""
    recorded = TRL["preferences"]
    logps, lengths = torch.tensor(recorded["logps"]), torch.tensor(recorded["lengths"])
    close(-logps[:4].sum() / lengths[:4].sum(), recorded["dpo"]["sft"])


def test_every_type_is_covered() -> None:
    assert set(DPO_LOSSES) == {*TRL_NAMES, "conservative", "kto_pair"}


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_a_better_policy_has_the_smaller_loss(loss_type: str) -> None:
    """And the gradient points there: chosen up, or rejected down."""
    zeros = torch.zeros(3)
    chosen, rejected = (torch.zeros(3, requires_grad=True) for _ in range(2))
    loss, *_ = dpo_loss(chosen, rejected, zeros, zeros, 0.1, loss_type, 0.01)
    loss.sum().backward()
    assert (chosen.grad <= 0).all() or loss_type in ("apo_down", "discopop")  # discopop: not monotone near 0
    assert (rejected.grad >= 0).all() or loss_type == "discopop"
    assert chosen.grad.abs().sum() + rejected.grad.abs().sum() > 0


@pytest.mark.parametrize(("options", "named"), [({"loss_type": "dpo"}, "sigmoid"), ({"label_smoothing": 0.5}, "0.5")])
def test_options_are_checked(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dpo_loss(*torch.zeros(4, 1), **options)
    with pytest.raises(ValueError, match="above 0"):
        dpo_loss(*torch.zeros(4, 1), loss_type="exo_pair")


def test_reward_loss_by_hand() -> None:
    """Scores 1 and 0 with margin 0.5 leave log s(0.5); centering adds 0.1 (1 + 0)^2."""
    chosen, rejected, margin = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.5])
    close(reward_loss(chosen, rejected, margin, center=0.1), [-log_s(0.5) + 0.1])


def test_reward_loss_as_in_trl() -> None:
    recorded = TRL["preferences"]
    scores, margin = torch.tensor(recorded["scores"]), torch.tensor(recorded["margin"])
    pairs = scores[:4], scores[4:]
    close(reward_loss(*pairs).mean(), recorded["reward"]["plain"])
    close(reward_loss(*pairs, margin).mean(), recorded["reward"]["margin"])
    close(reward_loss(*pairs, center=0.01).mean(), recorded["reward"]["center"])


# PPO.


def test_gae_by_hand() -> None:
    """Rewards 0, 1 then padding; values 0.5, 0.2; gamma 0.9, lambda 0.5.

    The last step: d = 1 - 0.2 = 0.8. The first: d = 0 + 0.9 * 0.2 - 0.5 = -0.32; A = -0.32 + 0.45 * 0.8 = 0.04.
    What stands in the padding (reward 9, value 9) is not looked at.
    """
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.2, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, True, False]]), gamma=0.9, lam=0.5)
    close(advantages, [[0.04, 0.8, 0.0]])
    close(returns, [[0.54, 1.0, 0.0]])


def test_whiten_by_hand() -> None:
    """1, 2, 3: mean 2, unbiased variance 1; the 100 is masked out."""
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    close(whiten(x, mask), [[-1.0, 0.0], [1.0, 0.0]])
    close(whiten(x, mask, shift_mean=False), [[1.0, 2.0], [3.0, 0.0]])
    assert whiten(x, mask & (x > 2)).isfinite().all(), "a single entry has no variance"
    assert masked_mean(x, torch.zeros_like(mask)) == 0


def test_policy_loss_by_hand() -> None:
    """Ratios 2 and 0.5 with advantages 1 and -1, clipped at 0.2: max(-2, -1.2) = -1.2 and max(0.5, 0.8) = 0.8."""
    logprobs = torch.tensor([[math.log(2.0), math.log(0.5), 50.0]])
    advantages, mask = torch.tensor([[1.0, -1.0, 3.0]]), torch.tensor([[True, True, False]])
    close(ppo_policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, 0.2), (-1.2 + 0.8) / 2)


def test_value_loss_by_hand() -> None:
    """v = 1, old 0, return 2, clip 0.2: max((1 - 2)^2, (0.2 - 2)^2) = 3.24, halved."""
    one = torch.ones(1, 1)
    close(ppo_value_loss(one, 0 * one, 2 * one, one.bool(), 0.2), 1.62)


def test_group_advantages_by_hand() -> None:
    """Scores 0, 1 of one prompt: mean 0.5, std sqrt(0.5); NaN counts for nothing; a lone score has no advantage."""
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(group_advantages(torch.tensor([0.0, 1.0]), 2), [-expected, expected])
    close(group_advantages(torch.tensor([0.0, 1.0]), 2, scale=False), [-0.5, 0.5])
    close(group_advantages(torch.tensor([0.0, 1.0, math.nan]), 3), [-expected, expected, 0.0])
    close(group_advantages(torch.tensor([math.nan, 3.0]), 2), [0.0, 0.0])


def test_kl_and_entropy_by_hand() -> None:
    logprobs, ref = torch.tensor([-1.0]), torch.tensor([-3.0])
    close(kl_estimate(logprobs, ref), [2.0])
    close(kl_estimate(logprobs, ref, "k3"), [math.exp(-2.0) - 1 + 2.0])
    with pytest.raises(ValueError, match="k1"):
        kl_estimate(logprobs, ref, "k2")  # type: ignore[arg-type]
    close(entropy(torch.zeros(2, 8)), [math.log(8)] * 2)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_ppo_as_in_trl(estimator: str) -> None:
    """TRL gives the score one step after EOS, where there is a step, and looks at the value there too."""
    given, recorded = TRL["ppo"], TRL["ppo"]["recorded"][estimator]
    numbers = {k: torch.tensor(given[k]) for k in ("logprobs", "ref_logprobs", "values", "vpred", "new_logprobs")}
    last = torch.tensor(given["last_token"])[:, None]
    steps = torch.arange(6)
    tokens, with_next = steps <= last, steps <= last + 1

    kl = torch.where(tokens, kl_estimate(numbers["logprobs"], numbers["ref_logprobs"], estimator), 0.0)  # type: ignore[arg-type]
    close(kl, recorded["kl"])
    rewards = -0.05 * kl
    end = torch.where(last + 1 < 6, last + 1, last)
    rewards.scatter_add_(1, end, torch.tensor(given["scores"])[:, None])
    rewards = whiten(rewards, with_next, shift_mean=False)
    close(rewards, recorded["rewards"])
    advantages, returns = gae(rewards, numbers["values"], with_next, 0.99, 0.95)
    close(returns, recorded["returns"])
    advantages = whiten(advantages, tokens)
    close(advantages, recorded["advantages"])
    policy = ppo_policy_loss(numbers["new_logprobs"], numbers["logprobs"], advantages, tokens, 0.2)
    close(policy, recorded["policy_loss"])
    close(ppo_value_loss(numbers["vpred"], numbers["values"], returns, with_next, 0.2), recorded["value_loss"])
