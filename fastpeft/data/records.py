"""Sources of rows in, checked records out: a JSON Lines file or rows in memory, in the forms of `fastpeft.data.forms`.

Bad rows are collected, so that a person hears of the first ten at once, or are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from fastpeft.data.forms import SFT_KEYS, Record, needed_keys, parse_row
from fastpeft.data.json_lines import rows_of_file
from fastpeft.data.row_values import RowError, json_type
from fastpeft.data.template import RowTemplate
from fastpeft.errors import UserError

OnBadRow = Literal["error", "skip"]
T = TypeVar("T")
_SHOWN_COMPLAINTS = 10


@dataclass
class RecordSet(Generic[T]):
    """What a source held: the good rows, and a complaint for each bad one (``on_bad_row="skip"``)."""

    name: str
    records: list[T] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


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
    template: RowTemplate | None = None,
) -> RecordSet[Record]:
    """Read training examples from a JSON Lines file or from rows in memory.

    Args:
        source: path of a file, or the rows themselves (a list, a ``datasets.Dataset``).
        limit: read no more than this many rows.
        on_bad_row: ``"error"`` or ``"skip"``.
        name: what messages call the source; the path as given, or ``"rows"``, if None.
        template: what of a row is its prompt and its answer; None for rows in a known form.
    Returns:
        The good records and the complaints about the bad ones.
    Raises:
        UserError: the source is missing or empty, or has a bad row and ``on_bad_row`` is ``"error"``, or only bad rows.
    """
    parse, needed = (parse_row, SFT_KEYS) if template is None else (template.parse, template.needed)
    return read_checked(source, parse, needed, limit=limit, on_bad_row=on_bad_row, name=name)


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
        rows = rows_of_file(path, name, needed)
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


def read_prompt_rows(path: str | Path, template: RowTemplate | None = None) -> list[Mapping[str, Any]]:
    """Read a JSON Lines file of rows to generate from: rows as in training, whose answers may be absent.

    Args:
        path: UTF-8 file, one JSON object a line; blank lines are passed over.
        template: as for `read_records`.
    Returns:
        The rows as they stand, with whatever other keys they have.
    Raises:
        UserError: the file cannot be read, or a row holds no prompt; the message names the file and the line.
    """
    path = Path(path).expanduser()
    rows: list[Mapping[str, Any]] = []
    complaints = []
    parse, needed = (parse_row, needed_keys(for_prompt=True)) if template is None else (template.parse, template.needed)
    for where, row in rows_of_file(path, str(path), needed):
        try:
            if isinstance(row, RowError):
                raise row
            parse(row, where, for_prompt=True)
            rows.append(row)
        except RowError as complaint:
            complaints.append(f"{where}: {complaint}")
    if complaints:
        raise UserError(describe_complaints(str(path), complaints, len(rows), may_skip=False))
    return rows


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
