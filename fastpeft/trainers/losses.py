"""Losses as pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.data import IGNORE_INDEX


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
