"""Data of the RLHF example: customers' questions to a shop, answered in four ways, of which the shop wants one.

    python examples/rlhf/generate.py [FOLDER]

Writes sft.jsonl (an answer of any kind), rankings.jsonl (all four, with their places), pairs.jsonl (the wanted one and
another), prompts.jsonl and prompts_test.jsonl (questions alone). Everything is made from the lists below and a seed.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
ITEMS = (
    "tea",
    "honey",
    "candles",
    "soap",
    "coffee",
    "chocolate",
    "lamps",
    "towels",
    "cups",
    "jam",
    "olive oil",
    "rice",
)
CITIES = ("Oslo", "Lyon", "Porto", "Vienna", "Ghent", "Turin", "Cork", "Bergen", "Graz", "Malaga")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
QUESTIONS = (
    "When will my {item} reach {city}?",
    "Has the {item} for {city} left your shop?",
    "I still wait for my {item} in {city}. Where is it?",
)
TEST_SHARE = 0.15


def answers(item: str, city: str, day: str) -> list[str]:
    """The answers to a question, from what the shop wants down to what it does not."""
    return [
        f"Thank you for asking. Your {item} will reach {city} on {day}.",
        f"The {item} will be in {city} on {day}.",
        f"Well, that depends on many things, on the roads and the weather and the people at the station, and it may be "
        f"{day} or it may be later, who knows.",
        "Why do you ask again? Look at the tracking page.",
    ]


def rows(seed: int = 0) -> Iterator[tuple[bool, str, list[str]]]:
    """Each question with its answers, and whether it is held out."""
    draw = random.Random(seed)
    combinations = list(product(QUESTIONS, ITEMS, CITIES))
    draw.shuffle(combinations)
    for question, item, city in combinations:
        held_out = draw.random() < TEST_SHARE
        yield held_out, question.format(item=item, city=city), answers(item, city, draw.choice(DAYS))


def write(path: Path, made: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def main(folder: Path = DATA) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    made: dict[str, list[dict[str, Any]]] = {"sft": [], "rankings": [], "pairs": [], "prompts": [], "prompts_test": []}
    for held_out, prompt, given in rows():
        if held_out:
            made["prompts_test"].append({"prompt": prompt})
            continue
        made["sft"].append({"prompt": prompt, "completion": draw.choice(given)})
        order = draw.sample(range(4), 4)
        ranking = [place + 1 for place in order]
        made["rankings"].append({"prompt": prompt, "responses": [given[place] for place in order], "ranking": ranking})
        made["pairs"].append({"prompt": prompt, "chosen": given[0], "rejected": draw.choice(given[1:])})
        made["prompts"].append({"prompt": prompt})
    for name, found in made.items():
        write(folder / f"{name}.jsonl", found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
