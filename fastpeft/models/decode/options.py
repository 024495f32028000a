"""What a decoding engine is asked for, and what it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastpeft.errors import UserError


@dataclass(frozen=True)
class DecodeOptions:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: tokens a completion may have.
        temperature: divides the logits; 0 takes the likeliest token, of equals the first.
        top_k: how many of the likeliest tokens are drawn from; 0 for all.
        top_p: the mass of the likeliest tokens that are drawn from; 1 for all.
        repetition_penalty: above 1 makes tokens that the prompt or the completion has less likely.
        min_new_tokens: tokens before a stop token may be drawn.
        stop_ids: tokens that end a completion.
        seed: of the draws; None takes one from torch's generator. Prompt i of a call has seed + i.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: a number is out of range; the message names it.
        """
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
        }
        for name, (holds, allowed) in ranges.items():
            if not holds:
                raise UserError(f"generate: {name} is {getattr(self, name)}; it must be {allowed}")


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        tokens: the stop token included, where there is one.
        logprobs: of each token under ``softmax(logits / temperature)`` (of the logits, where temperature is 0), before
            penalty and cuts; None where transformers' ``generate`` drew them.
        finished: whether it ends with a stop token.
    """

    tokens: list[int]
    logprobs: list[float] | None
    finished: bool
