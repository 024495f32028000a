"""Where PPO's scores come from: Python functions, a score layer of an adapter or a model; and what is no score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import UserError

RewardFunction = Callable[..., Sequence[float]]


def call_reward_function(
    function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str], columns: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Call a reward function, with the arguments TRL's GRPOTrainer gives it, and check that it gives numbers.

    Args:
        function: called as ``function(prompts=[...], completions=[...], answer=[...])`` with a list for each further
            key of the data's rows; None in the place of a key that a row does not have.
        prompts: the prompts as the data has them.
        completions: the texts sampled for them.
        columns: the further keys of each row.
    Returns:
        A number for each completion; NaN where the function gave None, NaN or infinity.
    Raises:
        UserError: it raised, or gave the wrong number of values, or something else than numbers.
    """
    name = getattr(function, "__name__", type(function).__name__)
    keys = dict.fromkeys(key for row in columns for key in row)
    further = {key: [row.get(key) for row in columns] for key in keys}
    try:
        given = function(prompts=list(prompts), completions=list(completions), **further)
    except Exception as error:
        raise UserError(
            f"reward function {name}: it raised {type(error).__name__}: {error} ({len(completions)} completions, the "
            f"first {completions[0][:60]!r}); no weight was changed by this batch"
        ) from error
    if isinstance(given, Tensor):
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"reward function {name}: it gave a {type(given).__name__}; it must give a list of numbers")
    if len(given) != len(completions):
        raise UserError(
            f"reward function {name}: it gave {len(given)} numbers for {len(completions)} completions; it must "
            "give one for each"
        )
    return [_number(value, name, index) for index, value in enumerate(given)]


def _number(value: Any, name: str, index: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"reward function {name}: sample {index} got a {type(value).__name__} ({str(value)[:40]!r}); it must be a "
            "number"
        ) from None
    return number if math.isfinite(number) else math.nan


def check_scores(scores: Tensor, completions: Sequence[str], on_bad_reward: str) -> Tensor:
    """Find the samples without a score.

    Args:
        scores: ``(b,)``; NaN where there is none.
        completions: the samples, for the message.
        on_bad_reward: ``"raise"`` or ``"skip"``.
    Returns:
        ``(b,)`` bool: which have one.
    Raises:
        UserError: some have none and ``on_bad_reward`` is ``"raise"``.
    """
    good = torch.isfinite(scores)
    if not bool(good.all()) and on_bad_reward == "raise":
        index = int((~good).nonzero()[0])
        raise UserError(
            f"{int((~good).sum())} of {len(scores)} rewards are no finite number; the first is that of sample {index}, "
            f"{completions[index][:60]!r}. No weight was changed by this batch; mend the reward, or leave such samples "
            "out with on_bad_reward: skip"
        )
    return good
