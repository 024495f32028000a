"""One row in, one checked record out.

A row is one JSON object in one of three forms, told apart by its keys; other keys may stand beside them:

    {"input": "...", "output": "..."}
    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

All become a `Record`, a list of turns. Nothing is guessed or filled in: a row that cannot be read exactly is a
complaint that names the file, the line, the key and the names near it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastpeft.data.row_values import NEAR, RowError, json_type, near_names, text_at

ROLES = ("system", "developer", "user", "assistant", "tool")
_PAIRS = (("input", "output"), ("prompt", "completion"))
_FORMS: tuple[tuple[str, ...], ...] = (("messages",), *_PAIRS)
_FORMS_IN_WORDS = "'input' and 'output', 'prompt' and 'completion', or 'messages'"
SFT_KEYS = f"the keys {_FORMS_IN_WORDS}"
_PROMPT_KEYS = ("input", "prompt", "messages")
_PROMPTS_IN_WORDS = "'input', 'prompt' or 'messages'"


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Record:
    """One checked training example: a dialogue whose last turn is the assistant's.

    Args:
        turns: the messages; a prompt and its answer are a user turn and an assistant turn.
        where: where it came from, for messages: ``train.jsonl:17``.
        separator: what stands between prompt and answer when the tokenizer has no chat template.
    """

    turns: tuple[Message, ...]
    where: str
    separator: str = ""


def parse_row(row: Mapping[str, Any], where: str, *, for_prompt: bool = False) -> Record:
    """Check one row and give it the common form.

    Args:
        row: the decoded JSON object.
        where: where it came from; kept in the record.
        for_prompt: the answer may be absent (a row to generate from); it is then the empty string.
    Raises:
        RowError: the row is not of a known form, or a value is not what its key asks for.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row is {json_type(row)}; it must be an object with {needed_keys(for_prompt)}")
    form = _recognise(row, for_prompt)
    if form == ("messages",):
        return Record(parse_messages(row["messages"], for_prompt), where)
    prompt_key, answer_key = form
    prompt = text_at(row, prompt_key)
    answer = text_at(row, answer_key) if answer_key in row or not for_prompt else ""
    space_needed = prompt and answer and not prompt[-1].isspace() and not answer[0].isspace()
    separator = " " if space_needed and form == ("input", "output") else ""
    return Record((Message("user", prompt), Message("assistant", answer)), where, separator)


def needed_keys(for_prompt: bool) -> str:
    """The keys of rows to train on or to generate from, for messages."""
    return f"one of the keys {_PROMPTS_IN_WORDS}" if for_prompt else SFT_KEYS


def parse_messages(messages: Any, for_prompt: bool, key: str = "messages") -> tuple[Message, ...]:
    """Check a dialogue: its turns, the last of them the assistant's unless ``for_prompt``."""
    if not isinstance(messages, (list, tuple)) or not messages:
        told = "an empty list" if isinstance(messages, (list, tuple)) else json_type(messages)
        raise RowError(f"key {key!r} is {told}; it must be a list of {{'role', 'content'}} objects")
    turns = []
    for index, message in enumerate(messages):
        place = f"{key}[{index}]: "
        if not isinstance(message, Mapping):
            raise RowError(f"{place}it is {json_type(message)}; it must be an object with 'role' and 'content'")
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            near = near_names(("role", "content"), [str(key) for key in message])
            hints = [f"{key!r} where it says {near[key]!r}" for key in missing if key in near]
            raise RowError(
                f"{place}no key {' and '.join(map(repr, missing))}; found {', '.join(map(repr, message)) or 'nothing'}"
                + (f"; did you mean {' and '.join(hints)}?" if hints else "")
            )
        role, content = text_at(message, "role", place), text_at(message, "content", place)
        if role not in ROLES:
            close = difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=NEAR)
            hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(ROLES)}"
            raise RowError(f"{place}role is {role!r}; {hint}")
        turns.append(Message(role, content))
    if turns[-1].role != "assistant" and not for_prompt:
        raise RowError(f"the last message is the {turns[-1].role}'s; a training dialogue ends with the assistant's")
    return tuple(turns)


def _recognise(row: Mapping[str, Any], for_prompt: bool) -> tuple[str, ...]:
    """The form whose keys the row has, or a complaint that names what is missing."""
    complete = [form for form in _FORMS if all(key in row for key in form)]
    if not complete and for_prompt:
        complete = [form for form in _PAIRS if form[0] in row]
    if len(complete) == 1:
        return complete[0]
    if complete:
        keys = " and ".join("/".join(map(repr, form)) for form in complete)
        raise RowError(f"the row has {keys}; keep the keys of one form, so that it is clear what to train on")
    found = [str(key) for key in row]
    if not found:
        raise RowError(f"the object is empty; it needs {needed_keys(for_prompt)}")
    listed = ", ".join(map(repr, found[:8])) + (", ..." if len(found) > 8 else "")
    if for_prompt:
        hints = [f"{key!r} where it says {there!r}" for key, there in near_names(_PROMPT_KEYS, found).items()]
        hint = f"; did you mean {' or '.join(hints)}?" if hints else ""
        raise RowError(f"no key {_PROMPTS_IN_WORDS}; found {listed}{hint}")
    near = {form: near_names(form, found) for form in _FORMS}
    form = max(_FORMS, key=lambda form: (sum(key in row for key in form), len(near[form])))
    present = any(key in row for key in form)
    if not present and not near[form]:
        raise RowError(f"no key of a known form; found {listed}; a row needs the keys {_FORMS_IN_WORDS}")
    missing = [key for key in form if key not in row]
    hints = [f"{key!r} where it says {near[form][key]!r}" for key in missing if key in near[form]]
    raise RowError(
        f"no key{'s' if len(missing) > 1 else ''} {' and '.join(map(repr, missing))}; found {listed}"
        + (f"; did you mean {' and '.join(hints)}?" if hints else f"; a row needs the keys {_FORMS_IN_WORDS}")
    )
