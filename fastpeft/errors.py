"""The errors fastpeft raises on purpose; every room may import them.

A ``UserError`` is something the person at the keyboard can mend: a path, a key, a row, a shape. The command line
prints its message alone and exits with code 2. Everything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastpeftError(Exception):
    """Base of every error that fastpeft raises on purpose."""


class UserError(FastpeftError, ValueError):
    """A mistake in what was given (file, key, row, shape, name); the message says what to do."""


class CudaError(FastpeftError, RuntimeError):
    """A CUDA call or launch failed, or CUDA was asked of a build that has none."""


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """End of a message about an unknown name: ``; did you mean 'x'?``, or nothing if no choice looks like it."""
    near = difflib.get_close_matches(given, choices, n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
