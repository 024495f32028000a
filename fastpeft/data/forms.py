"""One row in, one checked record out.

A row is one JSON object in one of six forms, told apart by its keys; other keys may stand beside them:

    {"input": "...", "output": "..."}
    {"prompt": "...", "completion": "..."}
    {"instruction": "...", "input": "...", "output": "..."}                       Alpaca; "input" may be absent
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}          ShareGPT
    {"text": "..."}                                      learnt whole, without a chat template, in rows of no other form

All become a `Record`, a list of turns. Nothing is guessed or filled in: a row that cannot be read exactly is a
complaint that names the file, the line, the key and the names near it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.data.row_values import NEAR, RowError, json_type, missing_keys, near_names, text_at

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Form:
    """How rows of one kind are written.

    Args:
        name: what reports call it.
        keys: those a training row has; the first is enough to generate from.
        separator: what stands between prompt and answer without a chat template, unless white space is there.
    """

    name: str
    keys: tuple[str, ...]
    separator: str = ""


@dataclass(frozen=True)
class _Dialect:
    """How the turns of a dialogue are written."""

    key: str
    role_key: str
    content_key: str
    roles: Mapping[str, str]


_INPUT = Form("input/output", ("input", "output"), " ")
_ALPACA = Form("Alpaca", ("instruction", "output"), "\n\n")
_MESSAGES = Form("messages", ("messages",))
_SHAREGPT = Form("ShareGPT", ("conversations",))
_TEXT = Form("text", ("text",))
_FORMS = (_MESSAGES, _INPUT, Form("prompt/completion", ("prompt", "completion")), _ALPACA, _SHAREGPT)
_KEY_SETS = [(form, frozenset(form.keys)) for form in _FORMS]  # compared for each of millions of rows
TEMPLATE = "template"  # of rows whose columns a template names (`fastpeft.data.template`)
FORM_NAMES = (*(form.name for form in (*_FORMS, _TEXT)), TEMPLATE)
_FORMS_IN_WORDS = (
    "'input' and 'output', 'prompt' and 'completion', 'instruction' and 'output', "
    "'messages', 'conversations', or 'text'"
)
SFT_KEYS = f"the keys {_FORMS_IN_WORDS}"
_PROMPT_KEY_NAMES = ("input", "prompt", "instruction", "messages", "conversations")
_PROMPTS_IN_WORDS = "'input', 'prompt', 'instruction', 'messages' or 'conversations'"
PROMPT_KEYS = f"one of the keys {_PROMPTS_IN_WORDS}"
_DIALECTS = (
    _Dialect("messages", "role", "content", {role: role for role in ROLES}),
    _Dialect(
        "conversations",
        "from",
        "value",
        {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"},
    ),
)


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
        form: name of the form of its row.
        plain: its one turn is a text to be learnt whole, which no chat template is put around.
    """

    turns: tuple[Message, ...]
    where: str
    separator: str = ""
    form: str = ""
    plain: bool = False


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
    if form is _TEXT:
        text = text_at(row, "text")
        if not text.strip():
            raise RowError("key 'text' is empty; there is nothing to learn")
        return Record((Message("assistant", text),), where, form=form.name, plain=True)
    if form in (_MESSAGES, _SHAREGPT):
        return Record(parse_messages(row[form.keys[0]], for_prompt, form.keys[0]), where, form=form.name)
    prompt_key, answer_key = form.keys
    prompt = text_at(row, prompt_key)
    if form is _ALPACA and row.get("input") is not None:  # tables have null where a row has no such key
        details = text_at(row, "input")
        prompt = f"{prompt}\n\n{details}" if details.strip() else prompt
    answer = text_at(row, answer_key) if answer_key in row or not for_prompt else ""
    space_needed = prompt and answer and not prompt[-1].isspace() and not answer[0].isspace()
    separator = form.separator if space_needed else ""
    return Record((Message("user", prompt), Message("assistant", answer)), where, separator, form.name)


def needed_keys(for_prompt: bool) -> str:
    """The keys of rows to train on or to generate from, for messages."""
    return PROMPT_KEYS if for_prompt else SFT_KEYS


def parse_messages(messages: Any, for_prompt: bool, key: str = "messages") -> tuple[Message, ...]:
    """Check a dialogue: its turns, the last of them the assistant's unless ``for_prompt``.

    Args:
        messages: what stands at the key.
        for_prompt: the last turn may be anybody's.
        key: ``"conversations"`` for turns of 'from' and 'value'; any other for turns of 'role' and 'content'.
    Raises:
        RowError: it is no list of turns, or a turn is not as it should be.
    """
    dialect = next((one for one in _DIALECTS if one.key == key), _DIALECTS[0])
    wanted = (dialect.role_key, dialect.content_key)
    if not isinstance(messages, (list, tuple)) or not messages:
        told = "an empty list" if isinstance(messages, (list, tuple)) else json_type(messages)
        raise RowError(f"key {key!r} is {told}; it must be a list of {{{', '.join(map(repr, wanted))}}} objects")
    turns = []
    for index, message in enumerate(messages):
        place = f"{key}[{index}]: "
        if not isinstance(message, Mapping):
            raise RowError(
                f"{place}it is {json_type(message)}; it must be an object with {' and '.join(map(repr, wanted))}"
            )
        if any(name not in message for name in wanted):
            raise RowError(f"{place}{_missing_in_turn(message, wanted)}")
        role, content = text_at(message, wanted[0], place), text_at(message, wanted[1], place)
        if role not in dialect.roles:
            close = difflib.get_close_matches(role.lower(), dialect.roles, n=1, cutoff=NEAR)
            hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(dialect.roles)}"
            raise RowError(f"{place}{wanted[0]} is {role!r}; {hint}")
        turns.append(Message(dialect.roles[role], content))
    if turns[-1].role != "assistant" and not for_prompt:
        raise RowError(f"the last message is the {turns[-1].role}'s; a training dialogue ends with the assistant's")
    return tuple(turns)


def _missing_in_turn(message: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """What a turn lacks, and where it would be right if it is written in another way."""
    told, hint = missing_keys(wanted, message)
    for other in _DIALECTS:
        if other.role_key not in wanted and other.role_key in message and other.content_key in message:
            return f"{told}; such turns stand under the key {other.key!r}"
    return told + hint


def _recognise(row: Mapping[str, Any], for_prompt: bool) -> Form:
    """The form whose keys the row has, or a complaint that names what is missing."""
    complete = [form for form, keys in _KEY_SETS if row.keys() >= keys]
    if not complete and for_prompt:
        complete = [form for form in _FORMS if form.keys[0] in row]
    if _ALPACA in complete and _INPUT in complete:
        complete.remove(_INPUT)
    if len(complete) == 1:
        if complete[0] is _INPUT and len(row) > 2:
            _check_instruction(row)
        return complete[0]
    if complete:
        keys = " and ".join("/".join(map(repr, form.keys)) for form in complete)
        raise RowError(f"the row has {keys}; keep the keys of one form, so that it is clear what to train on")
    if "text" in row and not for_prompt:
        beside = next((key for form in _FORMS for key in form.keys if key in row), None)
        if beside is None:
            return _TEXT
        raise RowError(
            f"the row has 'text' and {beside!r}; keep the keys of one form, so that it is clear what to train on"
        )
    raise RowError(_unrecognised(row, for_prompt))


def _check_instruction(row: Mapping[str, Any]) -> None:
    """Refuse an Alpaca row whose 'instruction' is misspelt: it would pass for {"input", "output"}, without its task."""
    for key in row:
        if str(key).strip().lower().startswith("inst") and near_names(("instruction",), [str(key)]):
            raise RowError(
                f"key {key!r} stands beside 'input' and 'output'; did you mean 'instruction'? "
                "If it is no part of the prompt, give it another name"
            )


def _unrecognised(row: Mapping[str, Any], for_prompt: bool) -> str:
    """What is wrong with a row that has the keys of no form."""
    found = [str(key) for key in row]
    if not found:
        return f"the object is empty; it needs {needed_keys(for_prompt)}"
    listed = ", ".join(map(repr, found[:8])) + (", ..." if len(found) > 8 else "")
    if for_prompt:
        hints = [f"{key!r} where it says {there!r}" for key, there in near_names(_PROMPT_KEY_NAMES, found).items()]
        hint = f"; did you mean {' or '.join(hints)}?" if hints else ""
        return f"no key {_PROMPTS_IN_WORDS}; found {listed}{hint}"
    forms = (*_FORMS, _TEXT)
    near = {form: near_names(form.keys, found) for form in forms}
    present = {form: sum(key in row for key in form.keys) for form in forms}
    # The more keys are there or nearly so, and the fewer are not, the likelier is a form.
    form = max(forms, key=lambda form: (present[form], len(near[form]), -len(form.keys)))
    if not present[form] and not near[form]:
        return (
            f"no key of a known form; found {listed}; a row needs the keys {_FORMS_IN_WORDS}, or "
            "data.prompt_template and data.answer_template to say what its own mean"
        )
    missing = [key for key in form.keys if key not in row]
    hints = [f"{key!r} where it says {near[form][key]!r}" for key in missing if key in near[form]]
    return f"no key{'s' if len(missing) > 1 else ''} {' and '.join(map(repr, missing))}; found {listed}" + (
        f"; did you mean {' and '.join(hints)}?" if hints else f"; a row needs the keys {_FORMS_IN_WORDS}"
    )
