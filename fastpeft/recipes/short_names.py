"""What to call folders that stand beside each other: as little of the end of each path as tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastpeft.errors import UserError


def short_names(folders: Sequence[str | Path], what: str, taken: Sequence[str] = ()) -> list[str]:
    """Name folders by the ends of their paths: ``tea`` and ``coffee``, or ``a/adapter`` and ``b/adapter``.

    Args:
        folders: their paths.
        what: what they are, which begins a complaint, such as "plot: the run".
        taken: names that mean something else.
    Returns:
        A name for each, all of them different.
    Raises:
        UserError: a folder is given twice.
    """
    whole = [Path(folder).expanduser().resolve() for folder in folders]
    for index, path in enumerate(whole):
        if path in whole[:index]:
            raise UserError(f"{what} {folders[index]} is given twice; give each folder once")
    for count in range(1, max((len(path.parts) for path in whole), default=0) + 1):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len({*names, *taken}) == len(names) + len(taken):
            return names
    return [str(path) for path in whole]
