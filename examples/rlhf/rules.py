"""What the shop wants of an answer, as a rule: a reward function for PPO, and the judge of the example."""

from __future__ import annotations

import re
from collections.abc import Sequence

MOST_WORDS = 20


def quality(prompt: str, answer: str) -> float:
    """The share of four wishes that an answer meets: polite, about the goods, with a place or day, and brief."""
    asked = re.search(r"(?:my|the) (.+?) (?:reach|for|in) ", prompt, flags=re.I)
    wishes = [
        answer.startswith("Thank you"),
        asked is not None and asked.group(1) in answer,
        re.search(r"day\b|[a-z] [A-Z][a-z]+\b", answer) is not None,
        0 < len(answer.split()) <= MOST_WORDS and answer.endswith("."),
    ]
    return sum(wishes) / len(wishes)


def style(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """`quality` of each completion."""
    return [quality(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
