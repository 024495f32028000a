"""Rows with columns of their own: two texts with fields say what of a row is its prompt and what its answer.

    RowTemplate("Context: {context} Question: {question}", "{answer}")

reads ``{"context": ..., "question": ..., "answer": ...}``, whatever other keys stand beside them. A field is a name of
letters, digits and underscores in braces; other braces are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastpeft.data.forms import TEMPLATE, Message, Record
from fastpeft.data.row_values import RowError, json_type, missing_keys, text_at
from fastpeft.errors import UserError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class RowTemplate:
    """How rows become a prompt and an answer.

    Args:
        prompt: text with fields in braces.
        answer: the same; a row to generate from may lack its fields.
    Raises:
        UserError: one of them has no field.
    """

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("answer", self.answer)):
            if not _FIELD.search(text):
                raise UserError(
                    f"the template of the {name} is {text!r}; it needs a field of a row, such as {{{name}}}"
                )

    @property
    def needed(self) -> str:
        """The keys of rows, for messages."""
        keys = [repr(key) for key in dict.fromkeys((*_fields(self.prompt), *_fields(self.answer)))]
        return f"the keys {', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else f"the key {keys[0]}"

    def parse(self, row: Mapping[str, Any], where: str, *, for_prompt: bool = False) -> Record:
        """Give one row the common form.

        Args:
            row: the decoded JSON object.
            where: where it came from; kept in the record.
            for_prompt: the answer's fields may be absent; the answer is then the empty string.
        Raises:
            RowError: a field is missing, or is neither text nor a number.
        """
        if not isinstance(row, Mapping):
            raise RowError(f"a row is {json_type(row)}; it must be an object with {self.needed}")
        has_answer = all(key in row for key in _fields(self.answer))
        wanted = [*_fields(self.prompt), *(_fields(self.answer) if has_answer or not for_prompt else ())]
        if any(key not in row for key in wanted):
            raise RowError("".join(missing_keys(wanted, row)))
        answer = _filled(self.answer, row) if has_answer else ""
        turns = Message("user", _filled(self.prompt, row)), Message("assistant", answer)
        return Record(turns, where, form=TEMPLATE)


def _fields(template: str) -> list[str]:
    return _FIELD.findall(template)


def _filled(template: str, row: Mapping[str, Any]) -> str:
    """The text with a row's values."""

    def value(found: re.Match[str]) -> str:
        key = found[1]
        is_number = isinstance(row[key], (int, float)) and not isinstance(row[key], bool)
        return str(row[key]) if is_number else text_at(row, key)

    return _FIELD.sub(value, template)
