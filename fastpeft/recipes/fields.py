"""Values from a YAML file as the types that a dataclass declares, and words for what does not fit."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastpeft.errors import did_you_mean
from fastpeft.recipes.yaml_file import Settings, shown

_LISTED_KEYS = 24  # a section with more keys is not listed in a message
# Types that need no conversion, with what counts as one; a truth value is no number, whatever Python says.
_PLAIN: dict[Any, Any] = {
    **{kind: kind for kind in (bool, int, str, list, dict, type(None))},
    float: (int, float),
}
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def hints_of(cls: type) -> dict[str, Any]:
    """Type of each field that the constructor of a dataclass takes."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def read_section(
    settings: Settings,
    section: str,
    tables: Mapping[str, Mapping[str, Any]],
    problems: list[str],
    home_of: Callable[[str], str] = lambda key: "",
) -> dict[str, Any]:
    """The section's values, converted to their types.

    Args:
        settings: what was given.
        section: its name.
        tables: keys and types of every section.
        problems: complaints are appended to it.
        home_of: where an unknown key belongs, as the end of a message, or nothing.
    """
    given = settings.values.get(section) or {}
    if not isinstance(given, dict):
        problems.append(f"{settings.origin(section)}: {section} is {shown(given)}; it takes keys and values")
        return {}
    values = {}
    for key, value in given.items():
        where = settings.origin(section, key)
        if key not in tables[section]:
            own_first = {section: tables[section], **tables}
            problems.append(f"{where}: unknown key {key!r} in {section}{home_of(key) or suggestion(key, own_first)}")
            continue
        try:
            values[key] = convert(value, tables[section][key])
        except TypeError:
            allowed = described(tables[section][key])
            nearest = did_you_mean(value, allowed.split(", "))
            problems.append(f"{where}: {section}.{key} is {shown(value)}; it takes {allowed}{nearest}")
    return values


def suggestion(key: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """What an unknown key was probably meant to be; ``tables`` begins with the section it stands in."""
    own, *others = tables
    nearest = did_you_mean(key, tables[own])
    if nearest:
        return nearest
    home = next((name for name in others if key in tables[name]), None)
    if home is not None:
        return f"; it belongs in {home}"
    if len(tables[own]) <= _LISTED_KEYS:
        return f"; the keys are {', '.join(tables[own])}"
    return ""


def section_suggestion(key: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """What an unknown key at the top level was probably meant to be: a section's key, or a section."""
    homes = [name for name in tables if key in tables[name]]
    section = did_you_mean(key, tables)
    if section and not homes:
        return section
    dotted = {f"{name}.{own}": own for name in tables for own in tables[name]}
    near = [key] if homes else difflib.get_close_matches(key, dotted.values(), n=1)
    if near:
        return f"; did you mean {' or '.join(full for full, own in dotted.items() if own == near[0])}?"
    return f"; the keys are {', '.join(tables)}"


def convert(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` has it; TypeError when it is not of that type."""
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if kind in (Union, UnionType):
        for part in parts:
            try:
                return convert(value, part)
            except TypeError:
                continue
    elif kind is Literal:
        if any(value == part and type(value) is type(part) for part in parts):
            return value
    elif kind is list and isinstance(value, list):
        return [convert(item, parts[0]) for item in value]
    elif kind is dict and isinstance(value, dict):
        return {key: convert(item, parts[1]) for key, item in value.items()}
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3 steps
    elif hint in _PLAIN and isinstance(value, _PLAIN[hint]) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def described(hint: Any) -> str:
    """A type in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        named = (described(part) for part in parts)
        return " or ".join(dict.fromkeys(words for words in named if words))
    if kind is Literal:
        return ", ".join(map(str, parts))
    if kind in (list, dict):
        return f"{_WORDS[kind]} of {described(parts[-1])}" if parts[-1] is not Any else _WORDS[kind]
    return _WORDS.get(hint, "")
