"""A folder that appears under its name only once everything in it is on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastpeft.errors import UserError

# A folder with one of these holds a model or an adapter, and may be replaced on request.
_MARKS = ("config.json", "adapter_config.json", "fastpeft_adapter.json")


def check_target(out: Path, command: str, *, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse a folder that cannot be written, or that holds something.

    Args:
        out: the folder to be written.
        command: for whom, which begins a complaint.
        overwrite: a folder that holds a model or an adapter may be replaced.
        inputs: files and folders that are read to make it.
    Raises:
        UserError: it must not be written.
    """
    own = out.expanduser().resolve()
    for given in inputs:
        path = given.expanduser().resolve() if given is not None else None
        if path is not None and path.exists() and (own == path or own in path.parents):
            raise UserError(f"{command}: {out} is or holds {given}, which is read; name another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{command}: {out} is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not any((out / mark).is_file() for mark in _MARKS):
        raise UserError(
            f"{command}: {out} is not empty, and it holds neither a model nor an adapter; name another folder"
        )
    if not overwrite:
        raise UserError(f"{command}: {out} holds a model already; replace it with --overwrite, or name another folder")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of ``out`` at the end; after a failure ``out`` is as it was.

    Args:
        out: what ``check_target`` found fit to be written.
    Returns:
        An empty folder beside it.
    """
    out = out.expanduser().absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    replaced = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        if out.exists():
            os.replace(out, replaced)
        os.replace(partial, out)
        _sync(out.parent)
    except BaseException:
        if replaced.exists() and not out.exists():
            os.replace(replaced, out)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
