"""A file in parts that end at line ends, and worker processes that take one part after another."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PART = 2 << 20  # bytes that a worker reads at once


def parts_of(path: Path) -> Iterator[tuple[int, int]]:
    """Where the parts of a file begin and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start < size:
            file.seek(min(start + _PART, size))
            file.readline()
            stop = file.tell()
            yield start, stop
            start = stop


def lines_of_part(path: str | Path, start: int, stop: int) -> list[bytes]:
    """The lines of a part without their ends, and without a byte order mark."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    lines = (data.removeprefix(b"\xef\xbb\xbf") if start == 0 else data).split(b"\n")
    return lines if lines[-1] else lines[:-1]


def count_lines(path: Path, start: int, stop: int) -> int:
    """How many lines a part has."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    return data.count(b"\n") + (not data.endswith(b"\n"))


_of_worker: Callable[[Any], Any]


def _begin_worker(function: Callable[[Any], Any]) -> None:
    global _of_worker
    _of_worker = function


def _work(task: Any) -> Any:
    return _of_worker(task)


@contextmanager
def mapped(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int | None) -> Iterator[Iterator[Any]]:
    """What a function makes of tasks, in their order, by worker processes where there are several of both.

    Args:
        function: is in every worker once; it has to take a copy to be pickled where processes are not forked.
        tasks: what it is called with.
        workers: processes; None for as many as there are processors.
    """
    workers = min(workers or _processors(), len(tasks))
    if workers < 2:
        yield map(function, tasks)
        return
    method = "fork" if sys.platform == "linux" else "spawn"  # a fork has the tokenizer, and torch, without loading them
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one thread
    try:
        with multiprocessing.get_context(method).Pool(workers, _begin_worker, (function,)) as pool:
            yield pool.imap(_work, tasks)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _processors() -> int:
    """Those this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
