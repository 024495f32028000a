r"""Rows in which answers to one prompt are compared, checked and given a common form.

    {"prompt": "...", "chosen": "...", "rejected": "..."}        a pair; "margin": 1.5 may stand beside it
    {"chosen": "...", "rejected": "..."}                         two whole dialogues, that begin with the prompt
    {"prompt": "...", "responses": [...], "ranking": [...]}      place of each response, 1 is the best; ties are allowed
    {"prompt": "...", "responses": [...], "scores": [...]}       the higher, the better

A prompt is the user's text or a list of messages; an answer is the assistant's text, or a list of messages that ends
with the assistant's. Dialogues in the text form of hh-rlhf ("\n\nHuman: ...\n\nAssistant: ...") become turns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from fastpeft.data.forms import Message, parse_messages
from fastpeft.data.row_values import RowError, json_type, near_names, text_at

COMPARISON_KEYS = "the keys 'chosen' and 'rejected' (and 'prompt'), or 'prompt', 'responses' and 'ranking' or 'scores'"
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Comparison:
    """A prompt, answers to it, and which of them is better than which.

    Args:
        prompt: the turns before the answers.
        responses: the answers.
        pairs: (better, worse), as indices of ``responses``; ties and equal texts make none.
        where: where it came from, for messages.
        margins: for each pair by how much, if the row says so.
        text: the prompt as the file has it, where it was a text with roles in it; for tokenizers without a template.
        equal: pairs left out because both texts are the same.
        tied: pairs left out because neither is better.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    where: str
    margins: tuple[float, ...] | None = None
    text: str | None = None
    equal: int = 0
    tied: int = 0


def parse_comparison(row: Mapping[str, Any], where: str) -> Comparison:
    """Check one row and give it the common form.

    Args:
        row: the decoded JSON object.
        where: where it came from.
    Raises:
        RowError: the row is not of a known form, or a value is not what its key asks for.
    """
    if "responses" in row:
        return _parse_ranking(row, where)
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        found = [str(key) for key in row]
        near = near_names(("chosen", "rejected", "responses", "ranking"), found)
        hints = [f"{key!r} where it says {there!r}" for key, there in near.items()]
        listed = ", ".join(map(repr, found[:8])) or "nothing"
        raise RowError(
            f"no key{'s' if len(missing) > 1 else ''} {' and '.join(map(repr, missing))}; found {listed}"
            + (f"; did you mean {' and '.join(hints)}?" if hints else f"; a row needs {COMPARISON_KEYS}")
        )
    chosen, rejected = row["chosen"], row["rejected"]
    text = None
    if "prompt" in row:
        prompt = _parse_prompt(row)
        answers = [_answer(row, key, prompt) for key in ("chosen", "rejected")]
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, answers, text = _split_texts(text_at(row, "chosen"), text_at(row, "rejected"))
    else:
        prompt, answers = _split_dialogues(row)
    for key, answer in zip(("chosen", "rejected"), answers, strict=True):
        _check_answer(answer, f"key {key!r}")
    margins = None
    if row.get("margin") is not None:
        margins = (_number(row["margin"], "key 'margin'"),)
    if answers[0] == answers[1]:
        return Comparison(prompt, tuple(answers), (), where, text=text, equal=1)
    return Comparison(prompt, tuple(answers), ((0, 1),), where, margins, text)


def _parse_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if "prompt" not in row:
        raise RowError(f"no key 'prompt'; found {', '.join(map(repr, row))}; a row needs {COMPARISON_KEYS}")
    if isinstance(row["prompt"], (list, tuple)):
        return parse_messages(row["prompt"], for_prompt=True, key="prompt")
    return (Message("user", text_at(row, "prompt")),)


def _answer(row: Mapping[str, Any], key: str, prompt: tuple[Message, ...]) -> str:
    """The text of an answer; a list of messages may repeat the prompt."""
    if not isinstance(row[key], (list, tuple)):
        return text_at(row, key)
    turns = parse_messages(row[key], for_prompt=False, key=key)
    if turns[:-1] not in ((), prompt):
        raise RowError(f"key {key!r} has {len(turns) - 1} messages before the answer, and they are not the prompt's")
    return turns[-1].content


def _check_answer(answer: str, place: str) -> None:
    if not answer.strip():
        raise RowError(f"{place} is empty; an answer needs text to be better or worse than another")


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        told = "null" if value is None else f"{json_type(value)} ({value!r})"
        raise RowError(f"{place} is {told}; it must be a finite number")
    return float(value)


def _split_texts(chosen: str, rejected: str) -> tuple[tuple[Message, ...], list[str], str]:
    """Prompt and answers of two whole dialogues in running text."""
    turns = [_hh_turns(text) for text in (chosen, rejected)]
    one, other = turns
    if one and other:
        if one[:-1] != other[:-1] or one[-1].role != "assistant" or other[-1].role != "assistant" or len(one) < 2:
            raise RowError(
                "'chosen' and 'rejected' are dialogues that differ before their last answers; give the part they share "
                "as 'prompt'"
            )
        begin = max(match.end() for match in _HH_TURN.finditer(chosen))
        return one[:-1], [one[-1].content, other[-1].content], chosen[:begin].rstrip(" ")
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    shared = chosen[:length]
    shared = shared[: length - len(re.split(r"\s", shared)[-1])]  # whole words
    if not shared.strip():
        raise RowError("no key 'prompt', and 'chosen' and 'rejected' do not begin alike; give the prompt by itself")
    return (Message("user", shared),), [chosen[len(shared) :], rejected[len(shared) :]], shared


def _hh_turns(text: str) -> tuple[Message, ...]:
    """The turns of a dialogue in the form of hh-rlhf; none for other texts."""
    first, *parts = _HH_TURN.split(text)
    if first.strip() or not parts:
        return ()
    return tuple(
        Message(_HH_ROLES[role], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)
    )


def _split_dialogues(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """Prompt and answers of two lists of messages."""
    one, other = (parse_messages(row[key], for_prompt=False, key=key) for key in ("chosen", "rejected"))
    if len(one) < 2 or one[:-1] != other[:-1]:
        raise RowError("no key 'prompt', and 'chosen' and 'rejected' do not share the messages before their last ones")
    return one[:-1], [one[-1].content, other[-1].content]


def _parse_ranking(row: Mapping[str, Any], where: str) -> Comparison:
    prompt, responses = _parse_prompt(row), row["responses"]
    if not isinstance(responses, (list, tuple)) or len(responses) < 2:
        told = f"a list of {len(responses)}" if isinstance(responses, (list, tuple)) else json_type(responses)
        raise RowError(f"key 'responses' is {told}; it must be a list of two answers or more")
    answers = []
    for index, response in enumerate(responses):
        place = f"responses[{index}]"
        if not isinstance(response, str):
            raise RowError(f"{place} is {'null' if response is None else json_type(response)}; it must be a string")
        _check_answer(response, place)
        answers.append(response)
    keys = [key for key in ("ranking", "scores") if key in row]
    if len(keys) != 1:
        raise RowError(
            f"the row has {' and '.join(map(repr, keys)) or 'no'} key for the order; give 'ranking' or 'scores'"
        )
    places = _order(row[keys[0]], keys[0], len(answers))
    pairs, equal, tied = [], 0, 0
    for i, j in combinations(range(len(answers)), 2):
        if answers[i] == answers[j]:
            equal += 1
        elif places[i] == places[j]:
            tied += 1
        else:
            pairs.append((i, j) if places[i] > places[j] else (j, i))
    return Comparison(prompt, tuple(answers), tuple(pairs), where, equal=equal, tied=tied)


def _order(given: Any, key: str, count: int) -> list[float]:
    """A number for each response, the higher, the better."""
    if not isinstance(given, (list, tuple)) or len(given) != count:
        told = f"a list of {len(given)}" if isinstance(given, (list, tuple)) else json_type(given)
        raise RowError(f"key {key!r} is {told}; it must be a list with a number for each of the {count} responses")
    numbers = [_number(value, f"{key}[{index}]") for index, value in enumerate(given)]
    if key == "scores":
        return numbers
    wrong = next((value for value in numbers if value < 1 or value % 1), None)
    if wrong is not None:
        raise RowError(f"key 'ranking' has {wrong:g}; it gives each response its place, 1 for the best, 2 for the next")
    return [-value for value in numbers]
