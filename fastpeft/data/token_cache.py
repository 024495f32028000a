"""Token rows on disk, for files larger than memory: made once by worker processes, read through the page cache.

A folder of the cache holds the rows of one file as `SFTDataset` has them (``tokens``, ``is_target``, ``offsets``) and a
manifest. Its name is a hash of everything the rows depend on: the bytes of the file, the tokenizer with its template,
the settings, and the versions that lay rows out. So it is never stale; and it is whole or absent, as it is written
beside and renamed. Rows are mapped into memory, not read: training touches those of its batch.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
import transformers

from fastpeft.data.forms import SFT_KEYS, Record, parse_row
from fastpeft.data.json_lines import check_json_lines, parse_line
from fastpeft.data.layout import Encoder
from fastpeft.data.parts import count_lines, lines_of_part, mapped, parts_of
from fastpeft.data.records import OnBadRow
from fastpeft.data.row_values import RowError
from fastpeft.data.sft import DataReport, SFTDataset, TokenRows, check_options
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2  # to be raised when rows are laid out or written differently
_FILES = {"tokens": "<i4", "is_target": "?", "offsets": "<i8"}
_MANIFEST = "manifest.json"
_BLOCK = 1 << 24  # bytes hashed at a time


def cached_sft_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    max_length: int = 1024,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
    workers: int | None = None,
) -> SFTDataset:
    """Give the rows of a file from the cache; tokenise them by worker processes where they are not in it.

    Args:
        path: a JSON Lines file.
        tokenizer: its chat template is used when it has one.
        cache_dir: the folder of the cache; made where it is missing.
        max_length: tokens a row may have; longer rows lose prompt, never answer.
        on_bad_row: ``"error"`` to list the bad rows and stop, ``"skip"`` to leave them out and count them.
        name: what messages and the report call the file; the path if None.
        workers: processes; None for as many as there are processors.
    Returns:
        The same rows as `build_sft_dataset` gives, mapped into memory.
    Raises:
        UserError: the file cannot be read, has bad rows, or no row of it can be used; the cache cannot be written.
    """
    check_options(max_length, on_bad_row, "cached_sft_dataset")
    path, cache_dir = Path(path).expanduser(), Path(cache_dir).expanduser()
    check_json_lines(path)
    name = name or str(path)
    folder = cache_dir / _key(path, tokenizer, max_length)
    found = _open(folder, name)
    if found is None:
        staging = cache_dir / f"{folder.name}.{os.getpid()}.part"
        try:
            staging.mkdir(parents=True, exist_ok=True)
            _write(staging, path, tokenizer, DataReport(name, max_length), on_bad_row, workers)
            _commit(staging, folder)
        except OSError as error:
            raise UserError(f"{cache_dir}: the cache of tokens cannot be written ({error.strerror})") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        found = _open(folder, name)
        assert found is not None
    found.report.finish(on_bad_row)
    return found


@dataclass
class _Tokeniser:
    """Makes token rows of a part of a file; lives in every worker."""

    encoder: Encoder
    name: str
    max_length: int

    def __call__(self, task: tuple[str, int, int, int]) -> TokenRows:
        path, start, stop, first_line = task
        rows = TokenRows(DataReport(self.name, self.max_length))
        records: list[Record] = []
        for number, line in enumerate(lines_of_part(path, start, stop), first_line):
            if line and not line.isspace():
                where = f"{self.name}:{number}"
                try:
                    records.append(parse_row(parse_line(line, SFT_KEYS), where))
                except RowError as complaint:
                    rows.report.complaints.append(f"{where}: {complaint}")
        rows.add(records, self.encoder)
        rows.report.complaints.sort(key=lambda complaint: int(complaint.removeprefix(f"{self.name}:").split(":")[0]))
        return rows


def _write(
    folder: Path,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    on_bad_row: OnBadRow,
    workers: int | None,
) -> None:
    """Tokenise a file part by part, append the rows to the files of a folder, and add the manifest."""
    parts = list(parts_of(path))
    first_lines = np.cumsum([1, *(count_lines(path, *part) for part in parts)])[:-1].tolist()
    tasks = [(str(path), *part, first) for part, first in zip(parts, first_lines, strict=True)]
    files = {key: (folder / key).open("wb") for key in _FILES}
    written = 0
    try:
        array("q", [0]).tofile(files["offsets"])
        with mapped(_Tokeniser(Encoder(tokenizer), report.name, report.max_length), tasks, workers) as results:
            for rows in results:
                rows.tokens.tofile(files["tokens"])
                files["is_target"].write(rows.is_target)
                (np.frombuffer(rows.offsets, np.int64)[1:] + written).tofile(files["offsets"])
                written += len(rows.tokens)
                _add(report, rows.report)
    finally:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
    report.finish(on_bad_row)  # what cannot be used is not kept
    sizes = {key: (folder / key).stat().st_size for key in _FILES}
    (folder / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "sizes": sizes, "report": vars(report)}), "utf-8")


def _add(total: DataReport, part: DataReport) -> None:
    for count in ("kept", "cut_prompts", "dropped_too_long", "empty_outputs", "prompt_tokens", "output_tokens"):
        setattr(total, count, getattr(total, count) + getattr(part, count))
    total.longest = max(total.longest, part.longest)
    for form, rows in part.forms.items():
        total.forms[form] = total.forms.get(form, 0) + rows
    lengths = [length for length in (total.shortest_dropped, part.shortest_dropped) if length]
    total.shortest_dropped = min(lengths, default=0)
    total.complaints += part.complaints


def _commit(staging: Path, folder: Path) -> None:
    """Put a whole folder in its place; one that another process has put there is as good."""
    if folder.exists() and _open(folder, "") is None:
        shutil.rmtree(folder)  # cut short by a full disk, or changed by hand
    try:
        staging.rename(folder)
    except OSError:
        if _open(folder, "") is None:
            raise


def _open(folder: Path, name: str) -> SFTDataset | None:
    """The rows of a folder; None where it is absent or not whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        if any((folder / key).stat().st_size != size for key, size in manifest["sizes"].items()):
            return None
        report = DataReport(**manifest["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    stored, report.name = report.name, name
    report.complaints = [name + complaint.removeprefix(stored) for complaint in report.complaints]
    # Copied on write, as torch warns of memory that it may not write to; nobody writes.
    maps = [torch.from_numpy(np.memmap(folder / key, np.dtype(kind), mode="c")) for key, kind in _FILES.items()]
    return SFTDataset(maps[0], maps[1], maps[2], report)


def _key(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """A hash of all that the rows depend on."""
    digest = blake2b(digest_size=16)
    for part in _settings(tokenizer, max_length):
        digest.update(repr(part).encode())
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _settings(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # padding and truncation are those of the last call
        vocabulary: Any = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        vocabulary = type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs
    special = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    versions = _FORMAT, transformers.__version__, tokenizers.__version__
    return versions, max_length, special, tokenizer.chat_template, vocabulary
