"""Losses as pure functions of tensors: tokens (SFT), preferences (DPO and its kin, reward models), and PPO.

Every function takes float tensors on one device and is differentiable in what a policy or a value head computes. Sums
are in the dtype that comes in; the trainers give float32.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.data import IGNORE_INDEX

KLEstimator = Literal["k1", "k3"]


# --- tokens ---


def token_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the negative log likelihoods of target tokens.

    Args:
        logits: ``(..., v)``, any floating dtype; the loss is computed in float32.
        targets: ``(...)``, int64 token ids; ``-100`` where there is no target.
    Returns:
        The sum (float32 scalar), the number of targets, and how many of them have the greatest logit (int64 scalars).
    """
    is_target = targets != IGNORE_INDEX
    count = is_target.sum()
    if logits.device.type == "cpu":  # on a GPU, selecting would wait for the device to say how many there are
        logits, targets, is_target = logits[is_target], targets[is_target], is_target[is_target]
    logits, targets, is_target = logits.flatten(0, -2), targets.flatten(), is_target.flatten()
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    with torch.no_grad():  # argmax would do, at many times the cost of amax on a CPU
        chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        correct = ((chosen == logits.amax(-1)) & is_target).sum()
    return total, count, correct


# --- preferences ---
# Each takes the log ratios of chosen and rejected, log pi(y|x) - log pi_ref(y|x), as (b,) tensors, beta, and the
# label smoothing; each gives (b,). In the formulas c and r are the log ratios and s is the logistic function.


def _sigmoid(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``-(1 - e) log s(beta (c - r)) - e log s(-beta (c - r))``: DPO, and with ``e > 0`` conservative DPO."""
    logits = beta * (c - r)
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def _hinge(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``max(0, 1 - beta (c - r))``: SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657."""
    return torch.relu(1 - beta * (c - r))


def _ipo(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``(c - r - 1 / (2 beta))^2``: IPO, arXiv 2310.12036, eq. 17; its authors average a completion over its tokens."""
    return (c - r - 1 / (2 * beta)) ** 2


def _robust(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``(-(1 - e) log s(d) + e log s(-d)) / (1 - 2 e)``, ``d = beta (c - r)``: labels flipped at rate e, 2403.00409."""
    logits = beta * (c - r)
    return (-(1 - smoothing) * F.logsigmoid(logits) + smoothing * F.logsigmoid(-logits)) / (1 - 2 * smoothing)


def _exo_pair(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``KL(s(+-d) || (1 - e, e))``, ``d = beta (c - r)``: EXO, arXiv 2402.00856, eq. 16."""
    logits = beta * (c - r)
    win, lose = F.logsigmoid(logits), F.logsigmoid(-logits)
    return win.exp() * (win - log(1 - smoothing)) + lose.exp() * (lose - log(smoothing))


def _nca_pair(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``-log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2``: NCA, arXiv 2402.05369."""
    return -F.logsigmoid(beta * c) - 0.5 * (F.logsigmoid(-beta * c) + F.logsigmoid(-beta * r))


def _bco_pair(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``-log s(beta c) - log s(-beta r)``: BCO, arXiv 2404.04656, without the running mean of rewards."""
    return -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r)


def _sppo_hard(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2``: SPPO, arXiv 2405.00675, eq. 4.7 with hard labels."""
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2


def _apo_zero(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``1 - s(beta c) + s(beta r)``: APO, arXiv 2408.06266, eq. 7; for chosen answers better than the model's."""
    return 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r)


def _apo_down(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``s(beta c) + 1 - s(beta (c - r))``: APO, arXiv 2408.06266, eq. 8; for chosen answers worse than the model's."""
    return torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r))


def _kto_pair(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``(1 - s(beta (c - mean(r)+)) + 1 - s(beta (mean(c)+ - r))) / 2``: KTO on pairs, arXiv 2402.01306.

    ``mean(.)+`` over the batch, floored at 0, stands for the KL divergence of policy and reference; the one of each
    side comes from the other. It is differentiated through, as in TRL 0.8, where the loss had this name.
    """
    kl_chosen, kl_rejected = c.mean().clamp(min=0), r.mean().clamp(min=0)
    return 1 - 0.5 * (torch.sigmoid(beta * (c - kl_rejected)) + torch.sigmoid(beta * (kl_chosen - r)))


def _discopop(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    """``-log s(d) (1 - s(d / t)) + exp(-d) s(d / t)``, ``d = beta (c - r)``, ``t = 0.05``: arXiv 2406.08414, eq. 5."""
    logits = beta * (c - r)
    share = torch.sigmoid(logits / 0.05)
    return -F.logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


_DPO_LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "conservative": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "kto_pair": _kto_pair,
    "discopop": _discopop,
}
# These sort the batch by log ratio first: AOT, arXiv 2406.05882, compares distributions, not pairs.
_SORTED_DPO_LOSSES = ("aot", "aot_unpaired")
DPO_LOSSES = (*_DPO_LOSSES, *_SORTED_DPO_LOSSES)
# Of these, a completion's log-probability is the mean over its tokens.
LENGTH_NORMALISED = ("ipo", "sigmoid_norm")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of preference pairs under one of `DPO_LOSSES`, TRL's names; their formulas stand beside them.

    For the types in `LENGTH_NORMALISED` give log-probabilities averaged over a completion's tokens; else their sums.

    Args:
        policy_chosen: ``(b,)`` log-probability of each chosen completion under the policy.
        policy_rejected: ``(b,)`` of each rejected one.
        ref_chosen: ``(b,)`` under the reference.
        ref_rejected: ``(b,)`` under the reference.
        beta: how strongly the policy is held to the reference.
        loss_type: which loss.
        label_smoothing: share of pairs taken to be labelled the wrong way round, for ``sigmoid`` (conservative DPO),
            ``robust``, ``exo_pair`` (above 0) and the ``aot`` types; the others do not read it.
    Returns:
        Loss, implicit reward of chosen and of rejected, ``beta`` times the log ratio, each ``(b,)``; the rewards carry
        no gradient.
    Raises:
        ValueError: an unknown type, or a smoothing that the type cannot take.
    Source:
        DPO, arXiv 2305.18290, eq. 7; conservative DPO, ericmitchell.ai/cdpo.pdf; length-normalised, arXiv 2411.15124.
    """
    if loss_type not in DPO_LOSSES:
        raise ValueError(f"dpo_loss: loss_type is {loss_type!r}; it must be one of {', '.join(DPO_LOSSES)}")
    if not 0 <= label_smoothing < 0.5 or (loss_type == "exo_pair" and label_smoothing == 0):
        needed = "above 0 and below 0.5" if loss_type == "exo_pair" else "0 or more and below 0.5"
        raise ValueError(f"dpo_loss: label_smoothing is {label_smoothing} with {loss_type!r}; it must be {needed}")
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    if loss_type == "aot":
        better = (policy_chosen - policy_rejected).sort().values
        loss = _sigmoid(better, (ref_chosen - ref_rejected).sort().values, beta, label_smoothing)
    elif loss_type == "aot_unpaired":
        loss = _sigmoid(chosen.sort().values, rejected.sort().values, beta, label_smoothing)
    else:
        loss = _DPO_LOSSES[loss_type](chosen, rejected, beta, label_smoothing)
    return loss, beta * chosen.detach(), beta * rejected.detach()


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center: float = 0.0) -> Tensor:
    """Bradley-Terry loss of pairs: ``-log s(chosen - rejected - margin) + center (chosen + rejected)^2``.

    Args:
        chosen: ``(b,)`` scores of the preferred answers.
        rejected: ``(b,)`` scores of the others.
        margin: ``(b,)`` by how much the first should win, where annotators said so.
        center: weight of a pull of scores towards a mean of 0, which the first term leaves open.
    Returns:
        ``(b,)``.
    Source:
        Llama 2, arXiv 2307.09288, eq. 2 (margin); Eisenstein et al., arXiv 2312.09244, section 2 (centering).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -F.logsigmoid(difference)
    return loss + center * (chosen + rejected) ** 2 if center else loss


# --- PPO ---


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries where ``mask`` is true; 0 where it nowhere is. Any shape in, a scalar out."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the masked entries to variance 1, and to mean 0 unless ``shift_mean`` is off; 0 elsewhere.

    ``(x - mean) / sqrt(var + 1e-8)`` with the unbiased variance; a single entry has none and counts as variance 0.

    Args:
        x: ``(b, t)``.
        mask: ``(b, t)`` bool.
        shift_mean: take the mean away; otherwise the result has the mean of ``x``.
    Returns:
        ``(b, t)``.
    """
    mean = masked_mean(x, mask)
    count = mask.sum()
    variance = masked_mean((x - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates; after the last unmasked step nothing follows, so its next value is 0.

    ``d_t = r_t + gamma v_{t+1} - v_t``, ``A_t = d_t + gamma lam A_{t+1}``, returns ``A + v``.

    Args:
        rewards: ``(b, t)`` of each step.
        values: ``(b, t)`` estimated before each step.
        mask: ``(b, t)`` bool; each row's true entries are its first ones.
        gamma: discount.
        lam: between one-step (0) and whole-episode (1) estimates.
    Returns:
        Advantages and returns, ``(b, t)`` without gradient, 0 where masked.
    Source:
        Schulman et al., arXiv 1506.02438, eq. 16.
    """
    rewards, values = (torch.where(mask, x.detach(), 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        following = rewards[:, step] + gamma * next_value - values[:, step] + gamma * lam * following
        following = torch.where(mask[:, step], following, 0.0)
        next_value = values[:, step]
        advantages[:, step] = following
    return advantages, advantages + values


def group_advantages(scores: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Advantages of GRPO: a completion's score against the others of its prompt, ``(s - mean) / (std + 1e-4)``.

    Args:
        scores: ``(b,)``; the completions of a prompt lie one after another. NaN where a score is to be left out.
        group_size: completions a prompt, at least 2.
        scale: divide by the group's (unbiased) standard deviation; off as in Dr. GRPO, arXiv 2503.20783.
    Returns:
        ``(b,)``; 0 where the score is NaN or has fewer than two in its group.
    Source:
        DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    groups = scores.view(-1, group_size)
    known = ~groups.isnan()
    count = known.sum(1, keepdim=True)
    deviation = torch.where(known, groups - groups.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    deviation = torch.where(count > 1, deviation, 0.0)
    if scale:
        std = (deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        deviation = deviation / (std + 1e-4)
    return deviation.flatten()


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Estimate ``KL(policy || reference)`` from samples of the policy, token by token.

    ``k1 = log p - log q``, unbiased, of either sign; ``k3 = exp(log q - log p) - 1 - (log q - log p)``, unbiased, never
    negative, of less variance.

    Args:
        logprobs: of the sampled tokens under the policy, any shape.
        ref_logprobs: of the same under the reference.
        kind: which.
    Source:
        Schulman, Approximating KL divergence, joschu.net/blog/kl-approx.html.
    """
    if kind not in ("k1", "k3"):
        raise ValueError(f"kl_estimate: kind is {kind!r}; it must be 'k1' or 'k3'")
    ratio = ref_logprobs - logprobs
    return -ratio if kind == "k1" else ratio.exp() - 1 - ratio


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """``mean(max(-A ratio, -A clip(ratio, 1 - e, 1 + e)))`` over the unmasked tokens of the batch.

    Args:
        logprobs: ``(b, t)`` of the sampled tokens under the policy that is trained.
        old_logprobs: ``(b, t)`` under the one that sampled them.
        advantages: ``(b, t)``.
        mask: ``(b, t)`` bool.
        clip_range: e.
    Source:
        PPO, arXiv 1707.06347, eq. 7.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(torch.max(-advantages * ratio, -advantages * clipped), mask)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """``0.5 mean(max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2))`` over the unmasked tokens of the batch.

    Args:
        values: ``(b, t)`` of the head that is trained.
        old_values: ``(b, t)`` from when the batch was sampled.
        returns: ``(b, t)``.
        mask: ``(b, t)`` bool.
        clip_range: e.
    Source:
        The clipped value loss of OpenAI baselines' ppo2; Engstrom et al., arXiv 2005.12729, section 3.
    """
    clipped = torch.max(torch.min(values, old_values + clip_range), old_values - clip_range)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each distribution, ``logsumexp(z) - sum(softmax(z) z)``: ``(..., v)`` in, ``(...)`` float32 out."""
    logits = logits.float()
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
