"""What rows are checked with: the complaint about a row, values by key and type, and the names near a wrong one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

NEAR = 0.6  # difflib's ratio from which a name counts as a misspelling of another
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


class RowError(Exception):
    """A complaint about one row; the caller adds where the row is and decides whether it stops the run."""


def near_names(wanted: Sequence[str], found: Sequence[str]) -> dict[str, str]:
    """For each wanted key that is absent, the found key that looks most like it."""
    near = {}
    for key in wanted:
        if key not in found:
            folded = {name.strip().lower(): name for name in found if name not in wanted}
            close = difflib.get_close_matches(key, folded, n=1, cutoff=NEAR)
            if close:
                near[key] = folded[close[0]]
    return near


def missing_keys(wanted: Sequence[str], holder: Mapping[str, Any]) -> tuple[str, str]:
    """What to say of keys that a row or a turn lacks: which, and which of its own may be meant, if any."""
    missing = [key for key in dict.fromkeys(wanted) if key not in holder]
    near = near_names(wanted, [str(key) for key in holder])
    hints = [f"{key!r} where it says {near[key]!r}" for key in missing if key in near]
    told = f"no key {' and '.join(map(repr, missing))}; found {', '.join(map(repr, holder)) or 'nothing'}"
    return told, f"; did you mean {' and '.join(hints)}?" if hints else ""


def text_at(holder: Mapping[str, Any], key: str, place: str = "") -> str:
    """The string at a key."""
    value = holder[key]
    if not isinstance(value, str):
        told = "null" if value is None else f"{json_type(value)} ({json.dumps(value, default=str)[:40]})"
        hint = "; write structured answers as a JSON string" if isinstance(value, (dict, list)) else ""
        raise RowError(f"{place}key {key!r} is {told}; it must be a string{hint}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{place}key {key!r} has half of a surrogate pair at character {error.start + 1}; "
                "write the character itself or both \\u escapes"
            ) from None
    return value


def json_type(value: object) -> str:
    """What a value is in JSON, in words."""
    return _JSON_TYPES.get(type(value), f"a {type(value).__name__}")
