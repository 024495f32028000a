"""Checkpoint folders that are whole or not there.

A checkpoint is written into a hidden folder beside its place (``.checkpoint-20.partial``), its files are flushed to the
disk, a manifest with the size and SHA-256 of each is added, and the folder is renamed. A run that dies at any moment
leaves the older checkpoints as they were. Reading starts by checking the manifest, so that a file cut off or changed
since is found before anything is loaded, and an older checkpoint is taken instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_READ_BYTES = 1 << 20


class BrokenCheckpoint(UserError):
    """A checkpoint folder is not what was written; the message says which file and how it differs."""


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run_dir) / f"checkpoint-{step}"


def staging_path(target: Path) -> Path:
    """The hidden folder in which a checkpoint is written before it takes its place."""
    return target.parent / f".{target.name}.partial"


def stage(target: Path) -> Path:
    """Make an empty `staging_path`; what an earlier, interrupted run left behind is removed.

    Args:
        target: final place of the checkpoint; its parent is made if needed.
    Returns:
        The empty folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".checkpoint-*.partial"):
        shutil.rmtree(leftover)
    staging = staging_path(target)
    staging.mkdir()
    return staging


def commit(staging: Path, target: Path, *, resumable: bool) -> None:
    """Seal a staged folder with its manifest and move it to its place, replacing what is there.

    Args:
        staging: the folder from `stage`, filled.
        target: the place given to `stage`.
        resumable: whether it holds optimizer and random states, not the weights alone.
    """
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "resumable": resumable,
        "files": {
            path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in files
        },
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*files, staging / MANIFEST, *(p for p in staging.rglob("*") if p.is_dir()), staging):
        _flush(path)
    if target.exists():
        replaced = target.with_name(f".{target.name}.replaced.partial")
        target.rename(replaced)
        staging.rename(target)
        shutil.rmtree(replaced)
    else:
        staging.rename(target)
    _flush(target.parent)


def verify(folder: Path, *, resumable: bool = False) -> None:
    """Compare a checkpoint with its manifest; files that the manifest does not name are not looked at.

    Args:
        folder: the checkpoint.
        resumable: ask also for the optimizer and random states that resuming needs.
    Raises:
        BrokenCheckpoint: the manifest or a file is missing, cut off or changed, or only weights were saved.
    """
    if not folder.is_dir():
        raise BrokenCheckpoint(f"{folder}: there is no such folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
    except FileNotFoundError:
        raise BrokenCheckpoint(
            f"{folder}: it has no {MANIFEST}, so it is half-written or another program's; fastpeft cannot vouch for it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"{folder / MANIFEST}: it cannot be read ({error!r})") from None
    if version != _FORMAT:
        raise BrokenCheckpoint(f"{folder / MANIFEST}: its format is {version}; this fastpeft reads format {_FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpoint(f"{path}: the manifest names it and it is not there")
        found = path.stat().st_size
        if found != expected["bytes"]:
            raise BrokenCheckpoint(f"{path}: it has {found:,} bytes where {expected['bytes']:,} were written")
        if _sha256(path) != expected["sha256"]:
            raise BrokenCheckpoint(f"{path}: its content is not what was written (the SHA-256 differs)")
    if resumable and not manifest.get("resumable"):
        raise BrokenCheckpoint(f"{folder}: it holds the weights alone (save_only_model); training cannot go on from it")


def newest_valid(run_dir: str | Path) -> Path:
    """The newest checkpoint of a run that is whole; a broken one is passed over with a warning.

    Args:
        run_dir: the run's ``output_dir``.
    Raises:
        UserError: there is no checkpoint, or none that is whole.
    """
    steps = list_steps(run_dir)
    if not steps:
        raise UserError(
            f"nothing to resume from: {run_dir} has no checkpoint-N folder; check output_dir, or start anew with "
            "train.resume=false (in Python: without resume_from_checkpoint)"
        )
    complaints = []
    for step in reversed(steps):
        folder = checkpoint_path(run_dir, step)
        try:
            verify(folder, resumable=True)
        except BrokenCheckpoint as broken:
            complaints.append(str(broken))
            logger.warning("CHECKPOINT %d IS BROKEN and will not be used. %s", step, broken)
            continue
        if complaints:
            logger.warning("Falling back to the older checkpoint %s.", folder)
        return folder
    raise UserError(
        "nothing to resume from: none of the run's checkpoints can be used; start anew with train.resume=false (in "
        "Python: without resume_from_checkpoint)\n  " + "\n  ".join(complaints)
    )


def list_steps(run_dir: str | Path) -> list[int]:
    """Steps for which a checkpoint folder exists, ascending."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in run_dir.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def sealed_steps(run_dir: str | Path) -> list[int]:
    """Steps whose checkpoint folder `commit` made, ascending; only such folders may be deleted as a run's.

    A ``checkpoint-N`` of another program, or one that is a link to elsewhere, does not count. The files are not
    compared with the manifest.
    """
    return [step for step in list_steps(run_dir) if _is_sealed(checkpoint_path(run_dir, step))]


def rotate(run_dir: str | Path, current: int, limit: int | None, keep: Iterable[int] = ()) -> None:
    """Delete the oldest checkpoints beyond a limit.

    Steps after the current one belong to a course of training that was given up (a resume from an older checkpoint)
    and go first; the current one always stays. Folders that are not `sealed_steps` are neither counted nor touched.

    Args:
        run_dir: the run's ``output_dir``.
        current: the step just saved.
        limit: how many to keep in all; None or 0 for every one.
        keep: steps that stay whatever their age, such as the best one's.
    """
    if not limit:
        return
    spared = {current, *keep}
    steps = sealed_steps(run_dir)
    by_age = sorted((step for step in steps if step not in spared), key=lambda step: (step <= current, step))
    for step in by_age[: max(0, len(steps) - limit)]:
        shutil.rmtree(checkpoint_path(run_dir, step))


def _is_sealed(folder: Path) -> bool:
    if folder.is_symlink():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "resumable", "files"} <= manifest.keys()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
