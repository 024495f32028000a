"""The lines of a JSON Lines file and the objects on them, or what is wrong with the file or the line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastpeft.data.row_values import NEAR, RowError, json_type
from fastpeft.errors import UserError


def rows_of_file(path: Path, name: str, needed: str) -> Iterator[tuple[str, Mapping[str, Any] | RowError]]:
    """Each non-blank line's place with its object or the complaint about it."""
    for number, line in _lines_of_file(path):
        if number == 1:
            _check_one_object_a_line(line, path)
        try:
            yield f"{name}:{number}", parse_line(line, needed)
        except RowError as complaint:
            yield f"{name}:{number}", complaint


def check_json_lines(path: Path) -> None:
    """Raise UserError for what is no JSON Lines file, as its first line tells, or has no line."""
    _, line = next(_lines_of_file(path), (0, b""))
    if not line:
        raise UserError(f"{path}: it is empty; it needs rows, one JSON object a line")
    _check_one_object_a_line(line, path)


def read_first_row(path: Path) -> Mapping[str, Any]:
    """The object on a file's first line; an empty one where that is no object, which others complain of."""
    try:
        _, line = next(_lines_of_file(path), (0, b"{}"))
        return parse_line(line, "")
    except (UserError, RowError):
        return {}


def read_text_lines(path: str | Path) -> list[str]:
    """Read the lines of a UTF-8 text file that are not blank, without surrounding white space.

    Args:
        path: the file; a byte order mark is passed over.
    Raises:
        UserError: the file cannot be read, or a line is not UTF-8.
    """
    path = Path(path).expanduser()
    lines = []
    for number, line in _lines_of_file(path):
        try:
            lines.append(_decode(line).strip())
        except RowError as complaint:
            raise UserError(f"{path}:{number}: {complaint}") from None
    return lines


def parse_line(line: bytes, needed: str) -> Mapping[str, Any]:
    """The object on a line.

    Args:
        line: its bytes.
        needed: the keys of such rows, for messages.
    Raises:
        RowError: it is not UTF-8, not JSON, or not an object.
    """
    text = _decode(line)
    if "\0" in text:
        raise RowError("the line has zero bytes, as after a crash or in UTF-32; write the file again, as UTF-8")
    try:
        row = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        mistake, at = _json_mistake(error, text)
        told = f"{mistake} at column {at + 1}: {_excerpt(text, at)}"
        raise RowError(f"not valid JSON: {told}") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON: {_lower_first(str(error))}") from None
    if not isinstance(row, dict):
        raise RowError(f"the line is {json_type(row)}; it must be an object with {needed}")
    return row


def _lines_of_file(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbers and the bytes of the lines that are not blank, without a byte order mark."""
    _check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                _check_magic(line, path)
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not line.isspace():
                yield number, line


def _check_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(child.name for child in path.iterdir() if child.suffix in (".jsonl", ".json"))
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise UserError(f"{path} is a folder; give the path of a JSONL file{hint}")
    if not path.exists():
        raise UserError(f"{path}: no such file{_near_files(path)}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; nor is there a folder {path.parent}"
    names = [child.name for child in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=NEAR)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def _check_magic(head: bytes, path: Path) -> None:
    """Refuse, by name, the files that are often given by mistake."""
    if head[:2] == b"\x1f\x8b":
        raise UserError(f"{path} is compressed with gzip; unpack it first (gunzip -k {path.name})")
    if head[:4] == b"PAR1":
        raise UserError(f"{path} is a Parquet file; convert it to JSON Lines first")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16 text; save it as UTF-8")


def _check_one_object_a_line(line: bytes, path: Path) -> None:
    """Refuse the JSON that is not JSON Lines by its first line."""
    first = line.strip()
    if first == b"{":
        raise UserError(f"{path}: its first object goes over several lines; JSON Lines has one object a line")
    if b"," in first and first[:1].isalpha():
        raise UserError(f"{path}: its first line reads like the head of a CSV table; convert it to JSON Lines first")
    if first[:1] == b"[":
        raise UserError(f"{path} begins with '[', a JSON list; JSON Lines has one object a line and no list around")


def _decode(line: bytes) -> str:
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise RowError(
            f"byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None


def _json_mistake(error: json.JSONDecodeError, text: str) -> tuple[str, int]:
    """What is wrong and where, in the same words for every version of Python."""
    comma = re.compile(r",\s*(?=[}\]])").search(text, max(0, error.pos - 1))  # 3.13 points at it, others behind it
    if comma is not None and comma.start() <= error.pos <= comma.end():
        return "a comma before the closing bracket", comma.end()
    mistake = _lower_first(error.msg)
    if text.startswith("'", error.pos):
        mistake = "single quotes (keys and texts stand in double quotes)"
    elif error.msg.startswith("Unterminated string"):
        mistake = "a text that does not end on its line, begun"
    elif error.msg == "Extra data":
        mistake = "a second value on one line"
    return mistake, error.pos


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"key {twice!r} stands {keys.count(twice)} times in one object; keep one")
    return row


def _excerpt(text: str, position: int, reach: int = 30) -> str:
    """The text around a position, which ``-->`` marks."""
    start, end = max(0, position - reach), min(len(text), position + reach)
    before, after = text[start:position], text[position:end]
    return f"{'...' if start else ''}{before} --> {after}{'...' if end < len(text) else ''}"


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]
