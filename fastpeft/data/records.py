"""JSON Lines in, checked records out.

A row is one JSON object in one of three forms, told apart by its keys; other keys may stand beside them:

    {"input": "...", "output": "..."}
    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

All become a `Record`, a list of turns. Nothing is guessed or filled in: a row that cannot be read exactly is a
complaint that names the file, the line, the key and the names near it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from fastpeft.errors import UserError

OnBadRow = Literal["error", "skip"]
T = TypeVar("T")

ROLES = ("system", "developer", "user", "assistant", "tool")
_PAIRS = (("input", "output"), ("prompt", "completion"))
_FORMS: tuple[tuple[str, ...], ...] = (("messages",), *_PAIRS)
_FORMS_IN_WORDS = "'input' and 'output', 'prompt' and 'completion', or 'messages'"
SFT_KEYS = f"the keys {_FORMS_IN_WORDS}"
_PROMPT_KEYS = ("input", "prompt", "messages")
_PROMPTS_IN_WORDS = "'input', 'prompt' or 'messages'"
_SHOWN_COMPLAINTS = 10
_NEAR = 0.6  # difflib's ratio from which a name counts as a misspelling of another
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


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


@dataclass
class RecordSet(Generic[T]):
    """What a source held: the good rows, and a complaint for each bad one (``on_bad_row="skip"``)."""

    name: str
    records: list[T] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class RowError(Exception):
    """A complaint about one row; the caller adds where the row is and decides whether it stops the run."""


def load_records(path: str | Path, limit: int | None = None, on_bad_row: OnBadRow = "error") -> list[Record]:
    """Read a JSON Lines file of training examples.

    Args:
        path: UTF-8 file, one JSON object a line; blank lines are passed over.
        limit: read no more than this many rows.
        on_bad_row: ``"error"`` to refuse the file, listing its bad rows, ``"skip"`` to leave them out.
    Returns:
        The records in the file's order.
    Raises:
        UserError: the file is missing, empty or unreadable, or a row is not as the module's introduction says.
    """
    return read_records(path, limit=limit, on_bad_row=on_bad_row).records


def read_records(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
) -> RecordSet[Record]:
    """Read training examples from a JSON Lines file or from rows in memory.

    Args:
        source: path of a file, or the rows themselves (a list, a ``datasets.Dataset``).
        limit: read no more than this many rows.
        on_bad_row: ``"error"`` or ``"skip"``.
        name: what messages call the source; the path as given, or ``"rows"``, if None.
    Returns:
        The good records and the complaints about the bad ones.
    Raises:
        UserError: the source is missing or empty, or has a bad row and ``on_bad_row`` is ``"error"``, or only bad rows.
    """
    return read_checked(source, parse_row, SFT_KEYS, limit=limit, on_bad_row=on_bad_row, name=name)


def read_checked(
    source: str | Path | Iterable[Mapping[str, Any]],
    parse: Callable[[Mapping[str, Any], str], T],
    needed: str,
    *,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
) -> RecordSet[T]:
    """Read rows of any kind; `read_records` has the arguments that are not here.

    Args:
        source: path of a file, or the rows themselves.
        parse: makes a record of a row and of where it came from, or raises RowError.
        needed: the keys of such rows, for messages.
        limit: read no more than this many rows.
        on_bad_row: ``"error"`` or ``"skip"``.
        name: what messages call the source.
    """
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be 1 or more, or None for all rows")
    rows: Iterable[tuple[str, Mapping[str, Any] | RowError]]
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        name = name or str(path)
        rows = _rows_of_file(path, name, needed)
    elif isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes)):
        name = name or "rows"
        rows = ((f"{name}[{index}]", row) for index, row in enumerate(source))
    else:
        raise UserError(
            f"training examples came as {type(source).__name__}; give the path of a JSONL file or a list of rows"
        )
    found: RecordSet[T] = RecordSet(name)
    for where, row in rows:
        if limit is not None and len(found.records) + len(found.complaints) >= limit:
            break
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, Mapping):
                raise RowError(f"a row is {json_type(row)}; it must be an object with {needed}")
            found.records.append(parse(row, where))
        except RowError as complaint:
            found.complaints.append(f"{where}: {complaint}")
    if found.complaints and (on_bad_row == "error" or not found.records):
        raise UserError(describe_complaints(found.name, found.complaints, len(found.records)))
    if not found.records:
        raise UserError(f"{found.name}: it is empty; it needs rows with {needed}")
    return found


def read_prompt_rows(path: str | Path) -> list[Mapping[str, Any]]:
    """Read a JSON Lines file of rows to generate from: rows as in training, whose answers may be absent.

    Args:
        path: UTF-8 file, one JSON object a line; blank lines are passed over.
    Returns:
        The rows as they stand, with whatever other keys they have.
    Raises:
        UserError: the file cannot be read, or a row holds no prompt; the message names the file and the line.
    """
    path = Path(path).expanduser()
    rows: list[Mapping[str, Any]] = []
    complaints = []
    for where, row in _rows_of_file(path, str(path), _needed_keys(for_prompt=True)):
        try:
            if isinstance(row, RowError):
                raise row
            parse_row(row, where, for_prompt=True)
            rows.append(row)
        except RowError as complaint:
            complaints.append(f"{where}: {complaint}")
    if complaints:
        raise UserError(describe_complaints(str(path), complaints, len(rows), may_skip=False))
    return rows


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


def read_first_row(path: Path) -> Mapping[str, Any]:
    """The object on a file's first line; an empty one where that is no object, which others complain of."""
    try:
        _, line = next(_lines_of_file(path), (0, b"{}"))
        return parse_line(line, "")
    except (UserError, RowError):
        return {}


def describe_complaints(name: str, complaints: Sequence[str], good: int, *, may_skip: bool = True) -> str:
    """One message for several bad rows: how many, then the first ten, one a line.

    Args:
        name: what they are the rows of.
        complaints: one for each bad row.
        good: how many rows are as they should be.
        may_skip: whether ``on_bad_row: skip`` is there to be advised.
    """
    if len(complaints) == 1 and not may_skip:
        return complaints[0]
    if len(complaints) == 1 and good:
        return f"{complaints[0]} (one bad row; on_bad_row: skip leaves it out)"
    lines = [
        f"{name}: {len(complaints)} of {len(complaints) + good} rows cannot be used",
        *complaints[:_SHOWN_COMPLAINTS],
    ]
    if len(complaints) > _SHOWN_COMPLAINTS:
        lines.append(f"... and {len(complaints) - _SHOWN_COMPLAINTS} more")
    if good and may_skip:
        lines.append("Mend them, or leave them out with on_bad_row: skip.")
    return "\n".join(lines)


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
        raise RowError(f"a row is {json_type(row)}; it must be an object with {_needed_keys(for_prompt)}")
    form = _recognise(row, for_prompt)
    if form == ("messages",):
        return Record(parse_messages(row["messages"], for_prompt), where)
    prompt_key, answer_key = form
    prompt = text_at(row, prompt_key)
    answer = text_at(row, answer_key) if answer_key in row or not for_prompt else ""
    space_needed = prompt and answer and not prompt[-1].isspace() and not answer[0].isspace()
    separator = " " if space_needed and form == ("input", "output") else ""
    return Record((Message("user", prompt), Message("assistant", answer)), where, separator)


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
        raise RowError(f"the object is empty; it needs {_needed_keys(for_prompt)}")
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


def _needed_keys(for_prompt: bool) -> str:
    return f"one of the keys {_PROMPTS_IN_WORDS}" if for_prompt else SFT_KEYS


def near_names(wanted: Sequence[str], found: Sequence[str]) -> dict[str, str]:
    """For each wanted key that is absent, the found key that looks most like it."""
    near = {}
    for key in wanted:
        if key not in found:
            folded = {name.strip().lower(): name for name in found if name not in wanted}
            close = difflib.get_close_matches(key, folded, n=1, cutoff=_NEAR)
            if close:
                near[key] = folded[close[0]]
    return near


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
            close = difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=_NEAR)
            hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(ROLES)}"
            raise RowError(f"{place}role is {role!r}; {hint}")
        turns.append(Message(role, content))
    if turns[-1].role != "assistant" and not for_prompt:
        raise RowError(f"the last message is the {turns[-1].role}'s; a training dialogue ends with the assistant's")
    return tuple(turns)


def json_type(value: object) -> str:
    """What a value is in JSON, in words."""
    return _JSON_TYPES.get(type(value), f"a {type(value).__name__}")


def _rows_of_file(path: Path, name: str, needed: str) -> Iterator[tuple[str, Mapping[str, Any] | RowError]]:
    """Each non-blank line's place with its object or the complaint about it."""
    for number, line in _lines_of_file(path):
        if number == 1:
            _check_one_object_a_line(line, path)
        try:
            yield f"{name}:{number}", parse_line(line, needed)
        except RowError as complaint:
            yield f"{name}:{number}", complaint


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


def check_json_lines(path: Path) -> None:
    """Raise UserError for what is no JSON Lines file, as its first line tells, or has no line."""
    _, line = next(_lines_of_file(path), (0, b""))
    if not line:
        raise UserError(f"{path}: it is empty; it needs rows, one JSON object a line")
    _check_one_object_a_line(line, path)


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
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=_NEAR)
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
