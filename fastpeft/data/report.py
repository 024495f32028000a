"""What becomes of a source's rows: counts that add up over the parts of a file, and the words for a person."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from fastpeft.data.records import OnBadRow, describe_complaints
from fastpeft.errors import UserError

_SHOWN = 3  # complaints in a summary


@dataclass
class Report:
    """What all kinds of rows have in common; all counts are of rows or tokens.

    ``rows`` is ``kept``, what was left out for its length or for other reasons, and one for each complaint.
    """

    name: str
    max_length: int
    rows: int = 0
    kept: int = 0
    dropped_too_long: int = 0
    longest: int = 0
    complaints: list[str] = field(default_factory=list)

    def add(self, part: Report) -> None:
        """Count what became of another part of the same source."""
        for name in (entry.name for entry in fields(self) if entry.name not in ("name", "max_length")):
            setattr(self, name, _together(name, getattr(self, name), getattr(part, name)))

    def rename(self, name: str) -> None:
        """Call the source something else, also where it stands before a line's number."""
        for key, value in vars(self).items():
            if isinstance(value, list):
                setattr(self, key, [name + place.removeprefix(self.name) for place in value])
        self.name = name

    def finish(self, on_bad_row: OnBadRow) -> None:
        """Sum up, and raise UserError if bad rows stop a run or no row is left."""
        good = self.kept + self.left_out()
        self.rows = good + len(self.complaints)
        if self.complaints and on_bad_row == "error":
            raise UserError(describe_complaints(self.name, self.complaints, good))
        if not self.kept:
            raise UserError(self.nothing_left())

    def left_out(self) -> int:
        """Rows that are as they should be and of no use."""
        return self.dropped_too_long

    def nothing_left(self) -> str:
        """The message about a source of which no row is kept."""
        return f"{self.name}: no row is left to learn from\n{self.summary()}"

    def summary(self) -> str:
        """A line on what was kept, and a line for each thing a person should know."""
        raise NotImplementedError

    def bad_line(self) -> list[str]:
        """A line on the rows with complaints; none where there are none."""
        count = len(self.complaints)
        more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
        return [f"  {count:,} bad, left out: {' | '.join(self.complaints[:_SHOWN])}{more}"] if count else []


def _together(name: str, one: Any, other: Any) -> Any:
    if name == "longest":
        return max(one, other)
    if name.startswith("shortest"):  # 0 where there is none
        return min(one, other) if one and other else one or other
    if isinstance(one, dict):
        return {**one, **{key: one.get(key, 0) + count for key, count in other.items()}}
    return one + other
