"""Token rows on disk, for files larger than memory: made once by worker processes, read through the page cache.

A folder of the cache holds the columns of one file's rows, as the data set of their kind has them (`SFTDataset`,
`PreferenceDataset`, `PromptDataset`), and a manifest. Its name is a hash of everything the rows depend on: the bytes of
the file, the tokenizer with its template, the settings, and the versions that lay rows out. So it is never stale; and
it is whole or absent, as it is written beside and renamed. Rows are mapped into memory, not read: training touches
those of its batch.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import tokenizers
import torch
import transformers

from fastpeft.data.columns import RowBuilder
from fastpeft.data.comparisons import COMPARISON_KEYS, parse_comparison
from fastpeft.data.forms import PROMPT_KEYS, SFT_KEYS, parse_row
from fastpeft.data.json_lines import check_json_lines, parse_line
from fastpeft.data.layout import Encoder
from fastpeft.data.parts import count_lines, lines_of_part, mapped, parts_of
from fastpeft.data.preferences import ComparisonRows, PreferenceDataset, PreferenceReport
from fastpeft.data.prompts import JsonRows, PromptDataset, PromptReport, PromptRows, parse_prompt
from fastpeft.data.records import OnBadRow
from fastpeft.data.report import Report
from fastpeft.data.row_values import RowError
from fastpeft.data.sft import DataReport, SFTDataset, TokenRows, check_options
from fastpeft.data.template import RowTemplate
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_D = TypeVar("_D")
_FORMAT = 3  # to be raised when rows are laid out or written differently
_MANIFEST = "manifest.json"
_BLOCK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class _Kind(Generic[_D]):
    """What is cached: how lines become records, records rows, and rows a data set."""

    name: str  # part of the key, so that it tells how lines are read
    parse: Callable[[Mapping[str, Any], str], Any]
    needed: str
    report: type[Report]
    builder: type[RowBuilder]
    dataset: Callable[..., _D]


def _prompt_dataset(texts: torch.Tensor, text_offsets: torch.Tensor, **given: Any) -> PromptDataset:
    return PromptDataset(given=JsonRows(texts, text_offsets), **given)


_SFT = _Kind("sft", parse_row, SFT_KEYS, DataReport, TokenRows, SFTDataset)
_PREFERENCE = _Kind(
    "preference", parse_comparison, COMPARISON_KEYS, PreferenceReport, ComparisonRows, PreferenceDataset
)
_PROMPT = _Kind("prompt", parse_prompt, PROMPT_KEYS, PromptReport, PromptRows, _prompt_dataset)


def cached_sft_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    max_length: int = 1024,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
    workers: int | None = None,
    template: RowTemplate | None = None,
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
        template: what of a row is its prompt and its answer; None for rows in a known form.
    Returns:
        The same rows as `build_sft_dataset` gives, mapped into memory.
    Raises:
        UserError: the file cannot be read, has bad rows, or no row of it can be used; the cache cannot be written.
    """
    check_options(max_length, on_bad_row, "cached_sft_dataset")
    kind = _SFT
    if template is not None:
        kind = replace(_SFT, name=f"sft {template!r}", parse=template.parse, needed=template.needed)
    return _cached(kind, path, tokenizer, cache_dir, max_length, on_bad_row, name, workers)


def cached_preference_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    max_length: int = 1024,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
    workers: int | None = None,
) -> PreferenceDataset:
    """Give the rows of `build_preference_dataset` from the cache; see `cached_sft_dataset`."""
    check_options(max_length, on_bad_row, "cached_preference_dataset")
    return _cached(_PREFERENCE, path, tokenizer, cache_dir, max_length, on_bad_row, name, workers)


def cached_prompt_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    max_length: int = 512,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
    workers: int | None = None,
) -> PromptDataset:
    """Give the rows of `build_prompt_dataset` from the cache; see `cached_sft_dataset`."""
    check_options(max_length, on_bad_row, "cached_prompt_dataset")
    return _cached(_PROMPT, path, tokenizer, cache_dir, max_length, on_bad_row, name, workers)


def _cached(
    kind: _Kind[_D],
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    max_length: int,
    on_bad_row: OnBadRow,
    name: str | None,
    workers: int | None,
) -> _D:
    path, cache_dir = Path(path).expanduser(), Path(cache_dir).expanduser()
    check_json_lines(path)
    name = name or str(path)
    folder = cache_dir / _key(kind.name, path, tokenizer, max_length)
    found = _open(kind, folder, name)
    if found is None:
        staging = cache_dir / f"{folder.name}.{os.getpid()}.part"
        try:
            staging.mkdir(parents=True, exist_ok=True)
            _write(kind, staging, path, tokenizer, kind.report(name, max_length), on_bad_row, workers)
            _commit(kind, staging, folder)
        except OSError as error:
            raise UserError(f"{cache_dir}: the cache of tokens cannot be written ({error.strerror})") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        found = _open(kind, folder, name)
        assert found is not None
    report, columns = found
    report.finish(on_bad_row)
    return kind.dataset(**columns, report=report)


@dataclass
class _Tokeniser:
    """Makes token rows of a part of a file; lives in every worker."""

    kind: _Kind[Any]
    encoder: Encoder
    name: str
    max_length: int

    def __call__(self, task: tuple[str, int, int, int]) -> RowBuilder:
        path, start, stop, first_line = task
        rows = self.kind.builder(self.kind.report(self.name, self.max_length))
        records: list[Any] = []
        for number, line in enumerate(lines_of_part(path, start, stop), first_line):
            if line and not line.isspace():
                where = f"{self.name}:{number}"
                try:
                    records.append(self.kind.parse(parse_line(line, self.kind.needed), where))
                except RowError as complaint:
                    rows.report.complaints.append(f"{where}: {complaint}")
        rows.add(records, self.encoder)
        rows.report.complaints.sort(key=lambda complaint: int(complaint.removeprefix(f"{self.name}:").split(":")[0]))
        rows.flatten()
        return rows


def _write(
    kind: _Kind[Any],
    folder: Path,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    on_bad_row: OnBadRow,
    workers: int | None,
) -> None:
    """Tokenise a file part by part, append the rows to the files of a folder, and add the manifest."""
    parts = list(parts_of(path))
    first_lines = np.cumsum([1, *(count_lines(path, *part) for part in parts)])[:-1].tolist()
    tasks = [(str(path), *part, first) for part, first in zip(parts, first_lines, strict=True)]
    columns = kind.builder.columns
    files = {key: (folder / key).open("wb") for key in columns}
    written = dict.fromkeys(columns, 0)  # pieces, where a column has offsets
    try:
        for key, column in columns.items():
            if column.ends_in:
                array("q", [0]).tofile(files[key])
        with mapped(_Tokeniser(kind, Encoder(tokenizer), report.name, report.max_length), tasks, workers) as results:
            for rows in results:
                before = dict(written)
                for key, column in columns.items():
                    values = np.frombuffer(rows.data[key], np.dtype(column.dtype))
                    if column.ends_in:
                        values = values[1:] + before[column.ends_in]
                    values.tofile(files[key])
                    written[key] += len(values)
                report.add(rows.report)
    finally:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
    report.finish(on_bad_row)  # what cannot be used is not kept
    sizes = {key: (folder / key).stat().st_size for key in columns}
    (folder / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "sizes": sizes, "report": vars(report)}), "utf-8")


def _commit(kind: _Kind[Any], staging: Path, folder: Path) -> None:
    """Put a whole folder in its place; one that another process has put there is as good."""
    if folder.exists() and _open(kind, folder, "") is None:
        shutil.rmtree(folder)  # cut short by a full disk, or changed by hand
    try:
        staging.rename(folder)
    except OSError:
        if _open(kind, folder, "") is None:
            raise


def _open(kind: _Kind[Any], folder: Path, name: str) -> tuple[Report, dict[str, torch.Tensor]] | None:
    """The report and the columns of a folder; None where it is absent or not whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        if any((folder / key).stat().st_size != size for key, size in manifest["sizes"].items()):
            return None
        report = kind.report(**manifest["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    report.rename(name)
    # Copied on write, as torch warns of memory that it may not write to; nobody writes.
    dtypes = {key: np.dtype(column.dtype) for key, column in kind.builder.columns.items()}
    return report, {key: torch.from_numpy(np.memmap(folder / key, dtype, mode="c")) for key, dtype in dtypes.items()}


def _key(kind: str, path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """A hash of all that the rows depend on."""
    digest = blake2b(digest_size=16)
    for part in (kind, *_settings(tokenizer, max_length)):
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
