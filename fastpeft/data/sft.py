"""Records -> token rows for supervised fine-tuning: what the model reads, and on which tokens it is taught.

With a chat template, a record is rendered by the template and every assistant turn is a target: its text and the
end-of-turn token after it (``<|im_end|>``, ``<|eot_id|>``), which is the EOS of a chat model. What the template writes
around the turns, the system and user turns, and whatever follows the end-of-turn token are read, not learnt.

Without one, the tokens are ``[BOS] prompt separator output EOS``; the separator is a space for {"input", "output"}
rows and nothing for {"prompt", "completion"} rows, and it counts as part of the output. BOS is there if the tokenizer
puts one first by itself.

Either way the prompt's tokens are exactly those that `encode_prompt` gives for generation.

A row longer than ``max_length`` loses prompt, never answer: first the oldest exchanges of a dialogue, then the
beginning of the user's text, then, if the template around it is too long itself, the beginning of everything but BOS.
A row whose answer and EOS alone are too long is dropped and counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from fastpeft.data.records import (
    Message,
    OnBadRow,
    Record,
    RowError,
    describe_complaints,
    parse_row,
    read_records,
)
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index
_CHUNK = 512  # rows handed to the tokenizer at once: enough for its threads, little memory


@dataclass
class DataReport:
    """What became of a source's rows; all counts are of rows or tokens.

    ``rows == kept + dropped_too_long + bad_rows``; ``cut_prompts`` and ``empty_outputs`` are among the kept.
    """

    name: str
    max_length: int
    rows: int = 0
    kept: int = 0
    cut_prompts: int = 0
    dropped_too_long: int = 0
    empty_outputs: int = 0
    bad_rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    longest: int = 0
    complaints: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line on what was kept, and a line for each thing a person should know."""
        lines = [
            f"{self.name}: {self.kept:,} of {self.rows:,} rows, {self.prompt_tokens:,} prompt and "
            f"{self.output_tokens:,} output tokens, longest row {self.longest:,} (limit {self.max_length:,})"
        ]
        if self.cut_prompts:
            lines.append(f"  {self.cut_prompts:,} too long: the beginning of the prompt was cut, the output is whole")
        if self.dropped_too_long:
            lines.append(
                f"  {self.dropped_too_long:,} dropped: the output alone is longer than {self.max_length:,} tokens"
            )
        if self.empty_outputs:
            lines.append(f"  {self.empty_outputs:,} with an empty output: they teach the model to answer nothing")
        if self.bad_rows:
            more = f" and {self.bad_rows - 3:,} more" if self.bad_rows > 3 else ""
            lines.append(f"  {self.bad_rows:,} bad, left out: {' | '.join(self.complaints[:3])}{more}")
        return "\n".join(lines)


class SFTDataset(Dataset[dict[str, list[int]]]):
    """Tokenised rows: item i is ``{"input_ids": list[int], "labels": list[int]}``.

    Labels are the token itself where it is a target and `IGNORE_INDEX` elsewhere. All rows lie in one int32 tensor
    (a list of Python lists would take ten times the memory), with the targets' flags beside it.

    Args:
        tokens: int32 ``(total,)``, the rows one after another.
        is_target: bool ``(total,)``.
        offsets: int64 ``(rows + 1,)``; row i is ``tokens[offsets[i]:offsets[i + 1]]``.
        report: what became of the source's rows.
    """

    def __init__(
        self, tokens: torch.Tensor, is_target: torch.Tensor, offsets: torch.Tensor, report: DataReport
    ) -> None:
        self._tokens = tokens
        self._is_target = is_target
        self._offsets = offsets
        self.report = report

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a data set of {len(self)} rows")
        index %= len(self)
        span = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        tokens = self._tokens[span]
        return {
            "input_ids": tokens.tolist(),
            "labels": tokens.masked_fill(~self._is_target[span], IGNORE_INDEX).tolist(),
        }

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for samplers that group rows of like length."""
        lengths: list[int] = self._offsets.diff().tolist()
        return lengths


def build_sft_dataset(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
) -> SFTDataset:
    """Read training examples and turn them into token rows with targets on the answers and their EOS.

    Args:
        source: a JSON Lines file, or rows in memory, in one of the forms of `fastpeft.data.records`.
        tokenizer: its chat template is used when it has one.
        max_length: tokens a row may have; longer rows lose prompt, never answer.
        on_bad_row: ``"error"`` to list the bad rows and stop, ``"skip"`` to leave them out and count them.
        name: what messages and the report call the source.
    Returns:
        The data set; its ``report`` says what was kept, cut and dropped.
    Raises:
        UserError: the source cannot be read, has bad rows, or no row of it can be used.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise UserError(f"build_sft_dataset: max_length is {max_length!r}; it must be a whole number of 2 or more")
    found = read_records(source, on_bad_row=on_bad_row, name=name)
    report = DataReport(found.name, max_length, complaints=found.complaints)
    encoder = _Encoder(tokenizer)
    tokens, is_target, offsets = array("i"), bytearray(), array("q", [0])
    shortest_answer = 0
    for row in _encode_all(encoder, found.records, report.complaints):
        row, was_cut = _fit(row, encoder, max_length)
        if len(row.ids) > max_length:
            report.dropped_too_long += 1
            shortest_answer = min(shortest_answer or row.answer_length, row.answer_length)
            continue
        flags = row.target_flags()
        report.cut_prompts += was_cut
        report.empty_outputs += any(turn.role == "assistant" and not turn.content for turn in row.record.turns)
        report.longest = max(report.longest, len(row.ids))
        report.output_tokens += sum(flags)
        tokens.extend(row.ids)
        is_target.extend(flags)
        offsets.append(len(tokens))
    if report.complaints and on_bad_row == "error":
        raise UserError(describe_complaints(found.name, report.complaints, len(found.records) - len(report.complaints)))
    report.kept = len(offsets) - 1
    report.bad_rows = len(report.complaints)
    report.rows = report.kept + report.dropped_too_long + report.bad_rows
    report.prompt_tokens = len(tokens) - report.output_tokens
    if not report.kept:
        raise UserError(_nothing_left(report, shortest_answer))
    return SFTDataset(
        torch.frombuffer(tokens, dtype=torch.int32),
        torch.frombuffer(is_target, dtype=torch.bool),
        torch.frombuffer(offsets, dtype=torch.int64),
        report,
    )


def encode_prompt(
    prompt: Record | Mapping[str, Any] | Sequence[Mapping[str, str]] | str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens a model is given to generate from: exactly those that training put before the (last) answer.

    Args:
        prompt: a record, a row as in the data file, a list of messages, or the user's text. An answer at the end,
            if there is one, is left out.
        tokenizer: the one used in training.
    Returns:
        Token ids, BOS included where the tokenizer or its template puts one.
    Raises:
        UserError: the prompt is not of a known form, or the chat template refuses it.
    """
    if isinstance(prompt, Record):
        record = prompt
    else:
        row: Any = prompt
        if isinstance(prompt, str):
            row = {"prompt": prompt}
        elif not isinstance(prompt, Mapping):
            row = {"messages": prompt}
        try:
            record = parse_row(row, "prompt", for_prompt=True)
        except RowError as complaint:
            raise UserError(f"encode_prompt: {complaint}") from None
    turns = record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns
    encoder = _Encoder(tokenizer)
    try:
        text = encoder.render_prompt(turns)
    except RowError as complaint:
        raise UserError(f"encode_prompt: {record.where}: {complaint}") from None
    return encoder.bos + encoder.encode([text])[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which to stop generating: the one that training puts after an answer, and the tokenizer's EOS.

    The two differ where a chat template ends turns with a token of its own, and where a converted tokenizer names the
    wrong EOS (transformers 5.17 gives SmolLM2's GGUF the token that begins a turn).

    Args:
        tokenizer: the one used in training.
    Returns:
        One or two token ids, in ascending order.
    Raises:
        UserError: the tokenizer has no EOS token, nor a chat template that ends turns with a special token.
    """
    encoder = _Encoder(tokenizer)
    if not encoder.has_template:
        encoder.require_eos()
    stops = {encoder.eos}
    sample = Record((Message("user", "a"), Message("assistant", "b")), "sample")
    for row in _encode_all(encoder, [sample], []) if encoder.has_template else ():
        stops.add(row.ids[-1])
    return sorted(stop for stop in stops if stop is not None)


@dataclass(frozen=True)
class _Text:
    """A rendered record: its text and, as character spans in it, the answers."""

    record: Record
    text: str
    answers: tuple[tuple[int, int], ...]
    add_eos: bool  # the text has no end-of-turn token after the last answer


@dataclass(frozen=True)
class _Row:
    """A tokenised record; ``answers`` are spans in ``ids``."""

    record: Record
    ids: list[int]
    answers: tuple[tuple[int, int], ...]

    @property
    def answer_length(self) -> int:
        start, end = self.answers[-1]
        return end - start

    def target_flags(self) -> bytearray:
        flags = bytearray(len(self.ids))
        for start, end in self.answers:
            flags[start:end] = b"\x01" * (end - start)
        flags[0] = 0  # nothing stands before the first token to predict it from
        return flags


class _Encoder:
    """A tokenizer, what is known of its special tokens, and the two ways to lay out a record."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self._special = {*tokenizer.all_special_tokens}
        self._special.update(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.eos: int | None = tokenizer.eos_token_id
        first = [] if self.has_template else tokenizer("")["input_ids"][:1]
        self.bos: list[int] = first if first and first[0] == tokenizer.bos_token_id else []
        self.bos_token_id: int | None = tokenizer.bos_token_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without the special tokens a tokenizer adds by itself."""
        if not texts:
            return []
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def render_prompt(self, turns: Sequence[Message]) -> str:
        """The text before an answer."""
        if self.has_template:
            return self._apply_template(turns, add_generation_prompt=True)
        if [turn.role for turn in turns] != ["user"]:
            roles = ", ".join(turn.role for turn in turns) or "none"
            raise RowError(
                f"a dialogue (turns before the answer: {roles}) needs a chat template and the tokenizer has none; "
                "set tokenizer.chat_template, or give 'input' and 'output'"
            )
        return turns[0].content

    def render(self, record: Record) -> _Text:
        """Lay out a whole record and find its answers."""
        if not self.has_template:
            self.require_eos()
            prompt = self.render_prompt(record.turns[:-1])
            text = prompt + record.separator + record.turns[-1].content
            return _Text(record, text, ((len(prompt), len(text)),), add_eos=True)
        answers: list[tuple[int, int]] = []
        text, ended = "", False
        for index, turn in enumerate(record.turns):
            if turn.role != "assistant":
                continue
            prompt = self.render_prompt(record.turns[:index])
            if not prompt.startswith(text):
                raise RowError(
                    f"the chat template writes an earlier assistant turn differently once turn {index} follows: "
                    f"{_first_difference(text, prompt)}; a template that keeps earlier turns as they were is needed, "
                    "or rows with one assistant turn each"
                )
            whole = self._apply_template(record.turns[: index + 1], add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise RowError(
                    "the chat template's generation prompt is not how it begins the answer itself: "
                    f"{_first_difference(prompt, whole)}; a model trained so would not be asked as it was taught"
                )
            length, ended = self._answer_end(whole[len(prompt) :], turn.content.strip())
            text = whole[: len(prompt) + length]
            answers.append((len(prompt), len(text)))
        if not ended:
            self.require_eos()
        return _Text(record, text, tuple(answers), add_eos=not ended)

    def cuttable(self, text: _Text) -> tuple[int, int]:
        """The characters of the last user turn before the first answer, the part of a prompt that may be shortened."""
        end = text.answers[0][0]
        if not self.has_template:
            return 0, end
        first_answer = next(i for i, turn in enumerate(text.record.turns) if turn.role == "assistant")
        users = [turn.content.strip() for turn in text.record.turns[:first_answer] if turn.role == "user"]
        start = text.text.rfind(users[-1], 0, end) if users else -1
        return (start, start + len(users[-1])) if start >= 0 else (0, 0)

    def tokenise(self, text: _Text, cuts: list[int], ids: list[list[int]]) -> tuple[list[int], list[int]]:
        """Join what `encode` gave for the text up to each cut (ascending, the last at the end of the text).

        Where the text up to a cut is not encoded to the beginning of the whole (a token would reach over the cut),
        the pieces are encoded one by one, so that a prompt's tokens are those it has alone.

        Returns:
            All token ids and the position of each cut in them.
        """
        whole = ids[-1]
        if any(whole[: len(part)] != part for part in ids[:-1]):
            starts = [0, *cuts[:-1]]
            pieces = self.encode([text.text[start:end] for start, end in zip(starts, cuts, strict=True)])
            whole = [token for piece in pieces for token in piece]
            ends = [sum(map(len, pieces[: count + 1])) for count in range(len(pieces))]
        else:
            ends = [len(part) for part in ids]
        whole = self.bos + whole
        ends = [len(self.bos) + end for end in ends]
        if text.add_eos and self.eos is not None:
            whole.append(self.eos)
            ends[-1] += 1
        return whole, ends

    def require_eos(self) -> None:
        """Raise UserError if there is no EOS token; called where nothing else ends an answer."""
        if self.eos is None:
            raise UserError(
                "the tokenizer has no EOS token, nor a chat template that ends turns with a special "
                "token, so a model could not learn where an answer ends; set tokenizer.eos_token"
            )

    def _apply_template(self, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [turn.as_dict() for turn in turns], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program: it refuses by raising what it likes
            raise RowError(
                f"the chat template refuses turns {', '.join(turn.role for turn in turns) or 'none'}: "
                f"{type(error).__name__}: {error}"
            ) from None
        return text

    def _answer_end(self, rendered: str, content: str) -> tuple[int, bool]:
        """Where the answer ends in its rendering, end-of-turn token included, and whether there is such a token."""
        indent = len(rendered) - len(rendered.lstrip())
        start = indent if rendered.startswith(content, indent) else rendered.find(content)
        written = start + len(content) if start >= 0 else 0
        found = [(at, token) for token in self._special if token and (at := rendered.find(token, written)) >= 0]
        if not found:
            return (written or len(rendered)), False
        # The first to begin; of two that begin there, the longer.
        at, token = min(found, key=lambda item: (item[0], -len(item[1])))
        return at + len(token), True


def _encode_all(encoder: _Encoder, records: Sequence[Record], complaints: list[str]) -> Iterator[_Row]:
    """Each record's tokens; a record the chat template refuses becomes a complaint."""
    for first in range(0, len(records), _CHUNK):
        texts = []
        for record in records[first : first + _CHUNK]:
            try:
                texts.append(encoder.render(record))
            except RowError as complaint:
                complaints.append(f"{record.where}: {complaint}")
        cuts = [[cut for answer in text.answers for cut in answer] for text in texts]
        encoded = iter(encoder.encode([text.text[:cut] for text, at in zip(texts, cuts, strict=True) for cut in at]))
        for text, at in zip(texts, cuts, strict=True):
            ids, ends = encoder.tokenise(text, at, [next(encoded) for _ in at])
            if ends[-1] < 2:
                complaints.append(f"{text.record.where}: prompt and output are both empty; there is nothing to learn")
                continue
            yield _Row(text.record, ids, tuple(zip(ends[::2], ends[1::2], strict=True)))


def _fit(row: _Row, encoder: _Encoder, max_length: int) -> tuple[_Row, bool]:
    """Cut prompt until the row fits, if it can; the second value says whether anything was cut."""
    if len(row.ids) <= max_length:
        return row, False
    for shorter in _without_oldest_exchanges(row.record):
        row = next(_encode_all(encoder, [shorter], []), row)
        if len(row.ids) <= max_length:
            return row, True
    if row.answers[-1][1] - row.answers[0][0] > max_length:
        return row, False
    text = encoder.render(row.record)
    cut_start, cut_end = encoder.cuttable(text)
    cuts = [cut_start, cut_end, *(cut for answer in text.answers for cut in answer)]
    ids, ends = encoder.tokenise(text, cuts, encoder.encode([text.text[:cut] for cut in cuts]))
    start, end = ends[:2]
    surplus = len(ids) - max_length
    if surplus > end - start:
        first_answer = ends[2]
        start = 1 if ids[0] == encoder.bos_token_id and surplus < first_answer else 0
    answers = tuple((a - surplus, b - surplus) for a, b in zip(ends[2::2], ends[3::2], strict=True))
    return replace(row, ids=ids[:start] + ids[start + surplus :], answers=answers), True


def _without_oldest_exchanges(record: Record) -> Iterator[Record]:
    """The dialogue without its first exchange, its first two, ... down to the last; the system turn stays."""
    turns = record.turns
    begin = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), 0)
    for index in range(begin + 1, len(turns)):
        if turns[index].role == "user" and turns[index - 1].role == "assistant":
            yield replace(record, turns=turns[:begin] + turns[index:])


def _nothing_left(report: DataReport, shortest_answer: int) -> str:
    if report.dropped_too_long:
        return (
            f"{report.name}: no row is left to train on: {report.dropped_too_long} of {report.rows} rows have an "
            f"output of more than max_length={report.max_length} tokens (the shortest needs {shortest_answer}); "
            "raise max_length"
        )
    return describe_complaints(report.name, report.complaints, 0)


def _first_difference(one: str, other: str, reach: int = 30) -> str:
    """The place where two texts part, quoted."""
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, shared - reach // 2)
    return f"{one[start : shared + reach]!r} against {other[start : shared + reach]!r}"
