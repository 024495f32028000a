"""What a file of rows holds, counted without keeping the rows: lengths, hashes and complaints, by worker processes.

A file is cut at line ends into parts of a few megabytes. A worker reads its part, parses each row as training does and
counts its tokens (`token_counts`, `skeleton`); what comes back is a few numbers a row. `_CHECKED` rows of a part
are laid out and tokenised as for training, and a part where a count differs is done again that way as a whole.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastpeft.data.comparisons import COMPARISON_KEYS, parse_comparison
from fastpeft.data.forms import FORM_NAMES, PROMPT_KEYS, SFT_KEYS, Message, Record, parse_row
from fastpeft.data.json_lines import check_json_lines, parse_line
from fastpeft.data.layout import Encoder, Row, encode_all, fit
from fastpeft.data.parts import count_lines, lines_of_part, mapped, parts_of
from fastpeft.data.preferences import fit_together, records_of
from fastpeft.data.prompts import parse_prompt
from fastpeft.data.row_values import RowError
from fastpeft.data.skeleton import Skeleton, find_skeleton
from fastpeft.data.template import RowTemplate
from fastpeft.data.token_counts import TokenCounter, is_cut
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["sft", "preference", "prompt"]
CUT, DROPPED, EMPTY, EQUAL, TIED = 1, 2, 4, 8, 16  # what a row's flags say
_FORM_NUMBERS = {name: number for number, name in enumerate(FORM_NAMES)}
_CHECKED = 16
_SHOWN = 5  # rows of a part kept as examples
_COMPLAINTS = 100  # of a part that are kept; all are counted
_ROW: Any = np.dtype(
    [
        *(("line", "i8"), ("tokens", "i4"), ("targets", "i4"), ("row", "u8"), ("prompt", "u8"), ("flags", "u1")),
        ("form", "i1"),  # index of FORM_NAMES, or -1
    ]
)


@dataclass
class Survey:
    """What the rows of a source are like.

    Args:
        name: what messages call the source.
        kind: which rows they are.
        rows: for each good row its line, tokens before anything is cut, tokens that carry loss, hashes of the whole row
            and of its prompt (of the whole where it has none), flags, and its form.
        bad: rows that cannot be used.
        complaints: about the first of them, with file and line.
        examples: some good rows, as ``(line, bytes)``.
        lines: lines of the file.
        stride: one line in so many was looked at.
    """

    name: str
    kind: Kind
    rows: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0, _ROW))
    bad: int = 0
    complaints: list[str] = field(default_factory=list)
    examples: list[tuple[int, bytes]] = field(default_factory=list)
    lines: int = 0
    stride: int = 1

    def count(self, flag: int) -> int:
        """Rows with a flag."""
        return int(np.count_nonzero(self.rows["flags"] & flag))

    def forms(self) -> dict[str, int]:
        """Rows of each form; empty for comparisons."""
        numbers, counts = np.unique(self.rows["form"], return_counts=True)
        return {FORM_NAMES[n]: int(count) for n, count in zip(numbers, counts, strict=True) if n >= 0}

    def places(self, flag: int, most: int) -> list[str]:
        """Where the first rows with a flag stand."""
        found = np.flatnonzero(self.rows["flags"] & flag)[:most]
        return [f"{self.name}:{line}" for line in self.rows["line"][found]]

    def duplicates(self) -> tuple[int, list[str]]:
        """Rows that say the same as an earlier one, and where the first of them stand."""
        _, first, back = np.unique(self.rows["row"], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[back] != np.arange(len(self.rows)))
        lines = self.rows["line"]
        return len(again), [f"{self.name}:{lines[i]} (as line {lines[first[back[i]]]})" for i in again[:3]]

    def overlap(self, other: Survey) -> tuple[int, list[str]]:
        """Rows here whose prompt stands in the other source too, and where the first of them stand."""
        shared = np.flatnonzero(np.isin(self.rows["prompt"], other.rows["prompt"]))
        return len(shared), [f"{self.name}:{line}" for line in self.rows["line"][shared[:3]]]


def survey(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind = "sft",
    max_length: int = 1024,
    sample: int | None = None,
    workers: int | None = None,
    name: str | None = None,
    on_part: Callable[[float], None] | None = None,
    template: RowTemplate | None = None,
) -> Survey:
    """Look at every row of a file.

    Args:
        path: a JSON Lines file.
        tokenizer: its chat template is used when it has one.
        kind: ``"sft"``, ``"preference"`` (pairs and rankings) or ``"prompt"``.
        max_length: tokens a row may have.
        sample: look at about so many rows, spread evenly; None for all.
        workers: processes; None for as many as there are processors.
        name: what messages call the file; the path if None.
        on_part: called with the share of the file that is done.
        template: of kind ``"sft"``, what of a row is its prompt and its answer; None for rows in a known form.
    Raises:
        UserError: the file is no JSON Lines file, or a dialogue cannot end (the tokenizer has no EOS).
    """
    path = Path(path).expanduser()
    check_json_lines(path)
    if sample is not None and sample < 1:
        raise UserError(f"survey: sample is {sample}; it must be 1 or more, or None for all rows")
    parts = list(parts_of(path))
    found = Survey(name or str(path), kind)
    begins = [0] * len(parts)
    if sample is not None:
        counts = [count_lines(path, *part) for part in parts]
        begins = np.cumsum([0, *counts])[:-1].tolist()
        found.stride = max(1, sum(counts) // sample)
    surveyor = _Surveyor(tokenizer, kind, max_length, template)
    tasks = [
        (str(path), start, stop, found.stride, -begin % found.stride)
        for (start, stop), begin in zip(parts, begins, strict=True)
    ]
    pieces = []
    with mapped(surveyor, tasks, workers) as results:
        for number, part in enumerate(results, 1):
            part.rows["line"] += found.lines
            pieces.append(part.rows)
            room = _COMPLAINTS - len(found.complaints)
            found.complaints += [f"{found.name}:{found.lines + line}: {text}" for line, text in part.complaints[:room]]
            found.bad += part.bad
            found.examples += [(found.lines + line, text) for line, text in part.examples]
            found.lines += part.lines
            if on_part is not None:
                on_part(number / len(tasks))
    found.rows = np.concatenate(pieces) if pieces else found.rows
    found.examples = found.examples[:: max(1, len(found.examples) // _SHOWN)][:_SHOWN]
    return found


@dataclass
class _Part:
    rows: np.ndarray[Any, Any]
    lines: int
    bad: int
    complaints: list[tuple[int, str]]
    examples: list[tuple[int, bytes]]


@dataclass
class _Item:
    """A parsed row: what has to be tokenised, and what is known without."""

    line: int
    records: list[Record]
    row: int
    prompt: int
    flags: int
    form: int = -1


@dataclass(frozen=True)
class _Laid:
    """How many texts of a record are to be counted, the last of them the answer, and the tokens beside them."""

    texts: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class _Frame:
    """A skeleton for counting: what no content touches is counted once.

    Args:
        before: what stands between the last token that keeps texts apart and a content, for each turn.
        after: what stands between a content and the next such token.
        stripped: as in the skeleton.
        prompt: tokens of the rest of the prompt.
        answer: tokens of the rest of the answer.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    stripped: tuple[bool, ...]
    prompt: int
    answer: int

    @classmethod
    def of(cls, skeleton: Skeleton, counter: TokenCounter) -> _Frame | None:
        """The frame of a skeleton; None where contents are not kept apart."""
        apart = re.compile("|".join(map(re.escape, counter.alone)) or r"(?!)")
        before, after, rests = [], [], []
        for index, fixed in enumerate(skeleton.fixed):
            found = [match.span() for match in apart.finditer(fixed)]
            if not found:
                if 0 < index < len(skeleton.fixed) - 1:
                    return None
                found = [(0, 0)] if index == 0 else [(len(fixed), len(fixed))]
            after.append(fixed[: found[0][0]])
            rests.append(fixed[found[0][0] : found[-1][1]])
            before.append(fixed[found[-1][1] :])
        rests[0], rests[-1] = after[0] + rests[0], rests[-1] + before[-1]
        counts = counter.count(rests)
        return cls(
            tuple(before[:-1]),
            tuple(after[1:]),
            skeleton.stripped,
            sum(counts[:-1]),
            counts[-1] + skeleton.add_eos,
        )

    def around(self, contents: Sequence[str]) -> list[str]:
        """The texts to count: each content with what touches it; what stands before the answer is by itself."""
        stripped = [text.strip() if strip else text for text, strip in zip(contents, self.stripped, strict=True)]
        asked = [b + text + a for b, text, a in zip(self.before[:-1], stripped[:-1], self.after[:-1], strict=True)]
        return [*asked, self.before[-1], stripped[-1] + self.after[-1]]


class _Surveyor:
    """Looks at parts of a file; lives in every worker."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kind: Kind, max_length: int, template: RowTemplate | None
    ) -> None:
        self._encoder = Encoder(tokenizer)
        self._counter = TokenCounter(self._encoder, tokenizer)
        self._template = str(tokenizer.chat_template or "")
        self._frames: dict[tuple[str, ...], _Frame | None] = {}
        self._kind = kind
        self._max_length = max_length
        self._read = {"sft": self._sft, "preference": self._preference, "prompt": self._prompt}[kind]
        self._needed = {"sft": SFT_KEYS, "preference": COMPARISON_KEYS, "prompt": PROMPT_KEYS}[kind]
        self._parse: Callable[..., Record] = parse_row
        if template is not None:
            self._parse, self._needed = template.parse, template.needed

    def __call__(self, task: tuple[str, int, int, int, int]) -> _Part:
        """Look at a part, without the garbage collector: it walks over all that torch has, and there is no garbage."""
        collects = gc.isenabled()
        gc.disable()
        try:
            return self._look(*task)
        finally:
            if collects:
                gc.enable()

    def _look(self, path: str, start: int, stop: int, stride: int, phase: int) -> _Part:
        lines = lines_of_part(path, start, stop)
        count = len(lines)
        part = _Part(np.empty(0, _ROW), count, 0, [], [])
        items = []
        for index in range(phase, count, stride):
            line = lines[index]
            if not line or line.isspace():
                continue
            try:
                items.append(self._read(parse_line(line, self._needed), index + 1))
            except RowError as complaint:
                part.bad += 1
                if len(part.complaints) < _COMPLAINTS:
                    part.complaints.append((index + 1, str(complaint)))
        self._measure(items, part)
        part.complaints.sort()
        good = part.rows["line"][:: max(1, len(part.rows) // _SHOWN)][:_SHOWN].tolist()
        part.examples = [(line, lines[line - 1]) for line in good]
        return part

    # Rows to items.

    def _sft(self, row: Mapping[str, Any], line: int) -> _Item:
        record = self._parse(row, "")
        empty = any(turn.role == "assistant" and not turn.content for turn in record.turns)
        asked, answer = (record.turns, "") if record.plain else (record.turns[:-1], record.turns[-1].content)
        return _Item(line, [record], *_hashes(asked, answer), EMPTY if empty else 0, _FORM_NUMBERS[record.form])

    def _preference(self, row: Mapping[str, Any], line: int) -> _Item:
        comparison = parse_comparison(row, "")
        flags = (EQUAL if comparison.equal else 0) | (TIED if comparison.tied else 0)
        records = records_of(comparison, self._encoder) if comparison.pairs else []
        return _Item(line, records, *_hashes(comparison.prompt, *comparison.responses), flags)

    def _prompt(self, row: Mapping[str, Any], line: int) -> _Item:
        record, _ = parse_prompt(row, "")
        turns = record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns
        asked = Record((*turns, Message("assistant", "")), "")
        return _Item(line, [asked], *_hashes(turns), 0, _FORM_NUMBERS[record.form])

    # Items to numbers.

    def _measure(self, items: list[_Item], part: _Part) -> None:
        """Add the rows of ``items`` to a part, and complaints about those that cannot be laid out."""
        lengths = self._lengths([record for item in items for record in item.records])
        rows = []
        for item in items:
            found = [next(lengths) for _ in item.records]
            complaint = next((one for one in found if isinstance(one, str)), None)
            if complaint is not None:
                part.bad += 1
                part.complaints.append((item.line, complaint))
                continue
            prompt, answer = max((one for one in found if not isinstance(one, str)), key=sum, default=(0, 0))
            flags = item.flags
            if prompt + answer > self._max_length:
                flags |= self._outcome(item, prompt, answer)
            rows.append((item.line, prompt + answer, answer, item.row, item.prompt, flags, item.form))
        part.rows = np.array(rows, _ROW)

    def _outcome(self, item: _Item, prompt: int, answer: int) -> int:
        """What becomes of a row that is too long."""
        if self._kind == "prompt":
            return DROPPED
        if self._kind == "sft" and sum(turn.role == "assistant" for turn in item.records[0].turns) == 1:
            return DROPPED if answer > self._max_length else CUT  # as `fit` does, without its pains
        rows = list(encode_all(self._encoder, item.records, []))
        if self._kind == "preference":
            return DROPPED if fit_together(rows, self._encoder, self._max_length) is None else CUT
        row, _ = fit(rows[0], self._encoder, self._max_length)
        return DROPPED if len(row.ids) > self._max_length else CUT

    def _lengths(self, records: list[Record]) -> Iterator[tuple[int, int] | str]:
        """For each record the tokens of its prompt and of its answers, or what is wrong with it."""
        if self._kind == "prompt":
            return self._quick(records)
        found = list(self._quick(records))
        for index in range(0, len(records), max(1, len(records) // _CHECKED)):
            if found[index] != self._exact(records[index]):
                return iter([self._exact(record) for record in records])
        return iter(found)

    def _quick(self, records: list[Record]) -> Iterator[tuple[int, int] | str]:
        texts: list[str] = []
        laid: list[_Laid | str] = []
        for record in records:
            try:
                laid.append(self._lay_out(record, texts))
            except RowError as complaint:
                laid.append(str(complaint))
        counts = iter(self._counter.count(texts))
        for record, found in zip(records, laid, strict=True):
            if isinstance(found, str):
                yield found
            elif not found.texts:
                yield self._exact(record)
            else:
                prompt = found.prompt + sum(islice(counts, found.texts - 1))
                answer = found.answer + next(counts)
                # Next to nothing is something to complain of, in training's own words.
                yield (prompt, answer) if prompt + answer > 1 or self._kind == "prompt" else self._exact(record)

    def _lay_out(self, record: Record, texts: list[str]) -> _Laid:
        """Add the texts to count of a record: those of the prompt, then the answer; none where it is as training's."""
        if record.plain:
            text = self._encoder.render(record)
            texts += ("", text.text)
            return _Laid(2, len(self._encoder.plain_bos), int(text.add_eos))
        roles = tuple(turn.role for turn in record.turns)
        if self._encoder.has_template and roles not in self._frames:
            skeleton = find_skeleton(self._encoder, roles, self._template)
            self._frames[roles] = None if skeleton is None else _Frame.of(skeleton, self._counter)
        frame, bos = self._frames.get(roles), len(self._encoder.bos)
        if frame is not None:
            *asked, answer = frame.around([turn.content for turn in record.turns])
            last = asked[-1]
            if answer and last and not is_cut(last + answer, len(last)):
                return _Laid(0, 0, 0)
            if self._kind == "prompt":
                texts += (*asked, "")
                return _Laid(len(asked) + 1, bos + frame.prompt, 0)
            texts += (*asked, answer)
            return _Laid(len(asked) + 1, bos + frame.prompt, frame.answer)
        if self._kind == "prompt":
            texts += (self._encoder.render_prompt(record.turns[:-1]), "")
            return _Laid(2, bos, 0)
        text = self._encoder.render(record)
        start = text.answers[0][0]
        if len(text.answers) > 1 or not is_cut(text.text, start):
            return _Laid(0, 0, 0)
        texts += (text.text[:start], text.text[start:])
        return _Laid(2, bos, int(text.add_eos))

    def _exact(self, record: Record) -> tuple[int, int] | str:
        """The lengths of a record as training tokenises it."""
        complaints: list[str] = []
        rows: list[Row] = list(encode_all(self._encoder, [record], complaints))
        if not rows:
            return complaints[0].removeprefix(f"{record.where}: ")
        answer = sum(end - start for start, end in rows[0].answers)
        return len(rows[0].ids) - answer, answer


def _hashes(prompt: Sequence[Message], *answers: str) -> tuple[int, int]:
    """A number for a whole row and one for its prompt; white space at the ends of texts does not count."""
    asked = "\x1e".join([f"{turn.role}\x1f{turn.content.strip()}" for turn in prompt])
    whole = "\x1d".join([asked, *map(str.strip, answers)])
    return tuple(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") for text in (whole, asked))  # type: ignore[return-value]
