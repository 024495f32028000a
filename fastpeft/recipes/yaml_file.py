"""Settings from a YAML file and ``a.b=c`` overrides, which remember where each of them was written.

Plain words are read as YAML 1.2 reads them: ``2e-4`` is a number, ``no`` and ``on`` are text (so that
``save_strategy: no`` means what it says), and only ``true`` and ``false`` are truth values. ``${a.b}`` refers to
another key, in OmegaConf's way; ``???`` marks a value that has to be given. A key written twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fastpeft.errors import UserError

Key = tuple[str, ...]


@dataclass(frozen=True)
class Unfilled:
    """What stands for a value that could not be had, in settings that are read with ``lenient``.

    Attributes:
        reason: the end of a message about its key.
    """

    reason: str


@dataclass(frozen=True)
class Settings:
    """Nested values, and for every key the place where it was written.

    Attributes:
        name: the file, as the user named it.
        values: mappings, lists, text, numbers, truth values and None.
        origins: ``("peft", "r") -> "orders.yaml:12"`` or ``"override 'peft.r=8'"``.
    """

    name: str
    values: dict[str, Any]
    origins: dict[Key, str]

    def origin(self, *key: str) -> str:
        """Where ``key`` was written; for a key that was not, its section; else the file."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        return self.name


def read_settings(path: str | Path, overrides: Iterable[str] = (), *, lenient: bool = False) -> Settings:
    """Read a YAML file, apply overrides in their order, and fill in ``${a.b}``.

    Args:
        path: a YAML file with a mapping at its top.
        overrides: ``"a.b=c"``; ``c`` is read as YAML.
        lenient: put `Unfilled` where a value has to be given or refers to one that is not there, for files of which not
            every key is used.
    Returns:
        The settings with the origin of each key.
    Raises:
        UserError: the file cannot be read or is not YAML, a key stands twice, an override or a reference is wrong.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as text: {error}") from error
    reader = _Reader(name)
    values = reader.read(text)
    if values is None:
        raise UserError(f"{name}: the file is empty; it needs at least the sections model, data and train")
    if not isinstance(values, dict):
        raise UserError(f"{name}:1: the top level has to be a mapping such as 'model:', and is {shown(values)}")
    for override in overrides:
        _apply(override, values, reader.origins)
    settings = Settings(name, values, reader.origins)
    return Settings(name, (_filled_where_possible if lenient else _interpolated)(settings), settings.origins)


def shown(value: Any) -> str:
    """A value as messages show it: as YAML writes it, with its kind where that is not plain."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value}"
    if isinstance(value, str):
        return f"{value!r} (text)"
    return f"{value} ({'a mapping' if isinstance(value, Mapping) else 'a list'})"


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain words follow YAML 1.2 (core schema)."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class _Reader:
    """Turns YAML nodes into plain values and notes the line of every key on the way.

    Args:
        name: what messages call the text.
        has_lines: False for an override, which is one line anyway.
    """

    def __init__(self, name: str, has_lines: bool = True) -> None:
        self.name = name
        self.has_lines = has_lines
        self.origins: dict[Key, str] = {}

    def read(self, text: str, key: Key = ()) -> Any:
        """The value of a whole document that stands at ``key``; None for an empty one."""
        try:
            self.loader = _Loader(text)
            node = self.loader.get_single_node()
            return None if node is None else self._value(node, key)
        except UserError:
            raise
        except RecursionError:
            raise UserError(f"{self.name}: an anchor (&name) contains itself") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = self._at(mark.line + 1) if mark is not None else self.name
            raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{self.name}: not valid YAML: {error}") from error

    def _at(self, line: int) -> str:
        return f"{self.name}:{line}" if self.has_lines else self.name

    def _value(self, node: yaml.Node, key: Key) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self._value(item, key) for item in node.value]
        # A plain word, or a tag, of which SafeLoader refuses those that would run code.
        return self.loader.construct_object(node)  # type: ignore[no-untyped-call]

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for name_node, _ in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                raise UserError(f"{self._at(line)}: a key has to be a plain word")
            name = name_node.value
            if name in lines:
                raise UserError(f"{self._at(line)}: key {name!r} stands twice; it is already on line {lines[name]}")
            lines[name] = line
        self.loader.flatten_mapping(node)  # '<<: *defaults' becomes its keys, before the mapping's own
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            child: Key = (*key, name_node.value)
            self.origins[child] = self._at(name_node.start_mark.line + 1)
            values[name_node.value] = self._value(value_node, child)
        return values


def _apply(override: str, values: dict[str, Any], origins: dict[Key, str]) -> None:
    """Put ``a.b=c`` into ``values``, making the mappings on the way."""
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise UserError(f"override {override!r}: not of the form section.key=value, such as train.max_steps=100")
    where = f"override {override!r}"
    reader = _Reader(where, has_lines=False)
    value = reader.read(text, key)
    section = values
    for depth, name in enumerate(key[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
            origins.setdefault(key[:depth], where)
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"{where}: {'.'.join(key[:depth])} is {shown(section)} and has no keys")
    section[key[-1]] = value
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins.update({key: where, **reader.origins})


def _interpolated(settings: Settings) -> dict[str, Any]:
    """The values with ``${a.b}`` filled in; a value that is still ``???`` is an error."""
    try:
        filled = OmegaConf.to_container(OmegaConf.create(settings.values), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = tuple(str(error.full_key or "").replace("[", ".").replace("]", "").split("."))
        where, dotted = settings.origin(*key), ".".join(key)
        if isinstance(error, MissingMandatoryValue):
            raise UserError(f"{where}: {dotted} is '???', so it has to be given: add {dotted}=VALUE") from None
        reason = str(error).partition("\n")[0]
        raise UserError(f"{where}: {dotted} cannot be filled in: {reason}") from error
    assert isinstance(filled, dict)
    return {str(name): value for name, value in filled.items()}


def _filled_where_possible(settings: Settings) -> dict[str, Any]:
    """The values with ``${a.b}`` filled in, and `Unfilled` where that fails."""
    filled = _fill(OmegaConf.create(settings.values))
    assert isinstance(filled, dict)
    return filled


def _fill(node: Any) -> Any:
    if OmegaConf.is_dict(node):
        return {str(key): _fill_item(node, key) for key in node}
    if OmegaConf.is_list(node):
        return [_fill_item(node, index) for index in range(len(node))]
    return node


def _fill_item(node: Any, key: Any) -> Any:
    if OmegaConf.is_missing(node, key):
        return Unfilled("is '???', so it has to be given")
    try:
        return _fill(node[key])
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        return Unfilled(f"cannot be filled in: {reason}")
