"""``fastpeft check``: what is wrong with a configuration and its data, without training and without weights.

Findings have two levels. An *error* stops a run or leaves it nothing to learn from; a *warning* is what a person has to
know: rows cut, dropped, empty, said twice, or in the validation data too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpeft.data import build_preference_dataset, build_prompt_dataset, build_sft_dataset
from fastpeft.data.json_lines import read_first_row
from fastpeft.data.sft import forms_in_words
from fastpeft.data.survey import CUT, DROPPED, EMPTY, EQUAL, TIED, Kind, Survey, survey
from fastpeft.errors import UserError
from fastpeft.recipes.load import load_tokenizer
from fastpeft.recipes.schema import KINDS, RunConfig, load_config
from fastpeft.recipes.yaml_file import read_settings

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_SHOWN_BAD = 10  # bad rows that are written out
_BARS = 12  # of the histogram
_PREVIEWS = 5
_LONGEST_PREVIEW = 1200  # characters of a sample
_DATA_KINDS: dict[str, Kind] = {"sft": "sft", "reward": "preference", "dpo": "preference", "ppo": "prompt"}


@dataclass
class Finding:
    """One thing to know about the data.

    Args:
        level: "error" or "warning".
        code: a word for programs: bad-row, no-rows, too-long, dropped, empty, equal, tied, duplicate, overlap.
        count: how many rows it is about.
        message: what a person reads, with the first places.
    """

    level: str
    code: str
    count: int
    message: str


@dataclass
class CheckReport:
    """What ``fastpeft check`` found.

    Args:
        kind: of the run: sft, reward, dpo or ppo.
        surveys: of the training data, and of the validation data where there is some.
        findings: worst first.
        samples: for each of some rows its place and its tokens, as (text, whether they carry loss).
        max_length: tokens a row may have.
    """

    kind: str
    surveys: list[Survey]
    max_length: int
    findings: list[Finding] = field(default_factory=list)
    samples: list[tuple[str, list[tuple[str, bool]]]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many findings would stop a run."""
        return sum(finding.level == "error" for finding in self.findings)

    def as_json(self) -> str:
        """The findings and the counts, for programs."""
        sources = [
            {"name": s.name, "rows": len(s.rows) + s.bad, "lines": s.lines, "bad": s.bad, "stride": s.stride,
             "forms": s.forms(), "tokens": int(s.rows["tokens"].sum()), "target_tokens": int(s.rows["targets"].sum())}
            for s in self.surveys
        ]  # fmt: skip
        findings = [vars(finding) for finding in self.findings]
        return json.dumps({"kind": self.kind, "sources": sources, "findings": findings}, indent=1, ensure_ascii=False)


def run_check(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: str | None = None,
    sample: int | None = None,
    workers: int | None = None,
    on_part: Callable[[float], None] | None = None,
) -> CheckReport:
    """Check a configuration and its data; the model's weights are not read.

    Args:
        path: the YAML of ``fastpeft sft``, ``reward``, ``dpo`` or ``ppo``.
        overrides: ``"a.b=c"``.
        kind: which of them; None to tell by the sections and the first row.
        sample: look at about so many rows of each file; None for all.
        workers: processes that read and count; None for as many as there are processors.
        on_part: called with the share of the training file that is done.
    Raises:
        UserError: the configuration, the tokenizer or a file cannot be read.
    """
    config = _config(path, overrides, kind)
    tokenizer = load_tokenizer(config.model)
    report = CheckReport(config.kind, [], config.text_length)
    for file, name, role in _files(config):
        found = survey(
            file,
            tokenizer,
            kind=_DATA_KINDS[config.kind],
            max_length=config.text_length,
            sample=sample,
            workers=workers,
            name=name,
            on_part=on_part if role == "train" else None,
            template=config.data.template,
        )
        if role == "eval":
            for trained in report.surveys:
                report.findings += _overlap(trained, found)
        report.surveys.append(found)
        report.findings += _findings(found, config)
    report.findings.sort(key=lambda finding: finding.level)
    report.samples = _samples(report.surveys[0], tokenizer, config)
    return report


def _files(config: RunConfig) -> list[tuple[Path, str, str]]:
    """Each file with its name as the user wrote it, and whether it is for training or evaluation."""
    given = config.settings.values["data"]
    several = not isinstance(config.data.train, Path)
    files = [(path, str(path) if several else str(given["train"]), "train") for path, _ in config.data.train_files]
    return [*files, *([(config.data.eval, str(given["eval"]), "eval")] if config.data.eval is not None else [])]


def _config(path: str | Path, overrides: Sequence[str], kind: str | None) -> RunConfig:
    """The configuration as the kind that it is for."""
    if kind is not None:
        if kind not in KINDS:
            raise UserError(f"check: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        return load_config(path, overrides, kind=kind)
    complaints = []
    for candidate in _candidates(path, overrides):
        try:
            return load_config(path, overrides, kind=candidate)
        except UserError as error:
            complaints.append(error)
    raise min(complaints, key=lambda error: str(error).count("\n"))


def _candidates(path: str | Path, overrides: Sequence[str]) -> Sequence[str]:
    """Kinds of run that a file may be for, the likeliest first."""
    settings = read_settings(path, overrides)
    if "reward" in settings.values:
        return ("ppo",)
    data: Any = settings.values.get("data")
    given = data.get("train") if isinstance(data, Mapping) else None
    if isinstance(given, list) and given:
        given = given[0].get("path") if isinstance(given[0], Mapping) else given[0]
    files = [folder / str(given) for folder in (Path.cwd(), Path(path).resolve().parent)] if given else []
    row = next((read_first_row(file) for file in files if file.is_file()), {})
    if "rejected" in row or "responses" in row or "chosen" in row:
        return ("dpo", "reward")
    return ("sft",)


def _findings(found: Survey, config: RunConfig) -> list[Finding]:
    findings = []
    limit = config.text_length

    def add(level: str, code: str, count: int, message: str, places: Sequence[str] = ()) -> None:
        if count:
            shown = f": {', '.join(places)}{', ...' if count > len(places) else ''}" if places else ""
            findings.append(Finding(level, code, count, f"{found.name}: {count:,} {message}{shown}"))

    skips = config.data.on_bad_row == "skip"
    listed = "".join(f"\n    {complaint}" for complaint in found.complaints[:_SHOWN_BAD])
    more = f"\n    ... and {found.bad - _SHOWN_BAD:,} more" if found.bad > _SHOWN_BAD else ""
    told = (
        "bad, left out (on_bad_row: skip)" if skips else "bad rows, which stop a run (on_bad_row: skip leaves them out)"
    )
    add("warning" if skips else "error", "bad-row", found.bad, f"{told}{listed}{more}")
    usable = len(found.rows) - found.count(DROPPED) - (found.count(EQUAL) if found.kind == "preference" else 0)
    if usable <= 0:
        findings.append(Finding("error", "no-rows", 1, f"{found.name}: no row is left to train on"))
    places = found.places(DROPPED, 3)
    why = "the prompt" if found.kind == "prompt" else "the answer alone" if found.kind == "sft" else "an answer"
    add("warning", "dropped", found.count(DROPPED), f"dropped: {why} is longer than {limit:,} tokens", places)
    add(
        "warning",
        "too-long",
        found.count(CUT),
        f"cut: longer than {limit:,} tokens, they lose prompt",
        found.places(CUT, 3),
    )
    add("warning", "empty", found.count(EMPTY), "with an empty output", found.places(EMPTY, 3))
    add("warning", "equal", found.count(EQUAL), "with equal answers, of which no pair is made", found.places(EQUAL, 3))
    add("warning", "tied", found.count(TIED), "with ties, of which no pair is made", found.places(TIED, 3))
    count, places = found.duplicates()
    add("warning", "duplicate", count, "say the same as an earlier row", places)
    return findings


def _overlap(train: Survey, held_out: Survey) -> list[Finding]:
    count, places = held_out.overlap(train)
    if not count:
        return []
    shown = ", ".join(places) + (", ..." if count > len(places) else "")
    told = f"{held_out.name}: {count:,} of {len(held_out.rows):,} rows have a prompt of {train.name} too: {shown}"
    return [Finding("warning", "overlap", count, told)]


def _samples(
    found: Survey, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Some rows as training lays them out."""
    samples = []
    for line, text in found.examples[:_PREVIEWS]:
        row = [json.loads(text)]
        options: dict[str, Any] = {"max_length": config.text_length, "name": f"{found.name}:{line}"}
        try:
            if found.kind == "sft":
                item: Any = build_sft_dataset(row, tokenizer, template=config.data.template, **options)[0]
                ids, flags = item["input_ids"], [label >= 0 for label in item["labels"]]
            elif found.kind == "preference":
                item = build_preference_dataset(row, tokenizer, **options)[0]
                ids, flags = [*item["prompt_ids"]], [False] * len(item["prompt_ids"])
                for completion in item["completions"]:
                    ids, flags = [*ids, *completion], [*flags, *[True] * len(completion)]
            else:
                ids = build_prompt_dataset(row, tokenizer, **options)[0]["input_ids"]
                flags = [False] * len(ids)
        except UserError:  # dropped, or without a pair: told of above
            continue
        samples.append((f"{found.name}:{line}", _pieces(ids, flags, tokenizer)))
    return samples


def _pieces(ids: Sequence[int], flags: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Runs of tokens that carry loss and of such that do not, as text; decoding token by token would break letters."""
    pieces = []
    begin = 0
    for index in range(1, len(ids) + 1):
        if index == len(ids) or flags[index] != flags[begin]:
            text = tokenizer.decode(ids[begin:index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append((str(text), flags[begin]))
            begin = index
    return pieces


# What a person reads.


def described(report: CheckReport) -> list[Text]:
    """The report as lines; colours show where there is a terminal, and the words say the same without."""
    from rich.text import Text

    lines = []
    for found in report.surveys:
        lines += [Text(line) for line in _counts(found, report)]
    for finding in report.findings:
        style = "bold red" if finding.level == "error" else "yellow"
        lines.append(Text.assemble((f"{finding.level} [{finding.code}] ", style), finding.message))
    if not report.findings:
        lines.append(Text("nothing to complain of", "green"))
    if report.samples:
        lines.append(Text.assemble("samples; loss is on ", ("«marked text»", "bold green")))
    for place, pieces in report.samples:
        lines.append(Text(f"-- {place}", "dim"))
        lines.append(_preview(pieces))
    return lines


def _preview(pieces: Sequence[tuple[str, bool]]) -> Text:
    from rich.text import Text

    line, room = Text(), _LONGEST_PREVIEW
    for text, carries_loss in pieces:
        shown = text if len(text) <= room else f"{text[: room // 2]} [...] {text[-(room // 2) :]}"
        room = max(200, room - len(shown))
        line.append(f"«{shown}»" if carries_loss else shown, "bold green" if carries_loss else None)
    return line


def _counts(found: Survey, report: CheckReport) -> list[str]:
    """The size of a source and the lengths of its rows."""
    tokens, targets = found.rows["tokens"], found.rows["targets"]
    forms = f"; {forms_in_words(found.forms())}" if found.forms() else ""
    looked = "" if found.stride == 1 else f" (one in {found.stride:,} looked at)"
    rows = f"{len(found.rows) + found.bad:,} rows"
    lines = [f"{found.name}: {rows}{looked}, {found.kind} data, checked as {report.kind}{forms}"]
    if not len(tokens):
        return lines
    middle, high = (int(np.percentile(tokens, q)) for q in (50, 95))
    lines.append(
        f"  {int(tokens.sum()):,} tokens, {int(targets.sum()):,} with loss; a row has {int(tokens.min()):,} to "
        f"{int(tokens.max()):,}, half up to {middle:,}, 95% up to {high:,} (limit {report.max_length:,})"
    )
    return lines + _histogram(tokens, report.max_length)


def _histogram(tokens: np.ndarray[Any, Any], limit: int) -> list[str]:
    """Bars of the lengths, up to the longest row; the limit is a border between two of them."""
    bottom, top = int(tokens.min()) - 1, int(tokens.max())
    last = min(top, limit)
    width = max(1, -(-(last - bottom) // _BARS))
    edges = [*range(bottom, last, width), max(last, bottom + 1)]
    if top > edges[-1]:
        edges.append(top)
    counts = [int(np.count_nonzero((tokens > low) & (tokens <= high))) for low, high in pairwise(edges)]
    most = max(counts)
    lines = []
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        bar = "█" * max(round(40 * count / most), 1 if count else 0)
        over = "  over the limit" if high > limit else ""
        lines.append(f"  {low + 1:>7,} - {high:>7,} {bar:<40} {count:,}{over}")
    return lines
