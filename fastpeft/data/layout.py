"""How a dialogue becomes tokens, with or without a chat template, and how it is made to fit.

With a chat template, a record is rendered by the template and every assistant turn is an answer: its text and the
end-of-turn token after it (``<|im_end|>``, ``<|eot_id|>``), which is the EOS of a chat model. What the template writes
around the turns, the system and user turns, and whatever follows the end-of-turn token are read, not learnt.

Without one, the tokens are ``[BOS] prompt separator output EOS``; the separator is a space for {"input", "output"}
rows, an empty line for Alpaca's and nothing for the others, and it counts as part of the output. BOS is there if the
tokenizer puts one first by itself. A {"text"} row is ``[BOS] text EOS`` whatever the tokenizer, and all output.

Either way the prompt's tokens are exactly those that `encode_prompt` gives for generation.

A row longer than ``max_length`` loses prompt, never answer: first the oldest exchanges of a dialogue, then the
beginning of the user's text, then, if the template around it is too long itself, the beginning of everything but BOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastpeft.data.forms import Message, Record, parse_row
from fastpeft.data.row_values import RowError
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512  # rows handed to the tokenizer at once: enough for its threads, little memory


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
    try:
        return prompt_ids(record, Encoder(tokenizer))
    except RowError as complaint:
        raise UserError(f"encode_prompt: {record.where}: {complaint}") from None


def prompt_ids(record: Record, encoder: Encoder) -> list[int]:
    """The tokens before the (last) answer of a record, which may be absent; see `encode_prompt`.

    Raises:
        RowError: the record is a text, which has no prompt, or the chat template refuses it.
    """
    if record.plain:
        raise RowError("a row of plain text has no prompt; give its beginning as one")
    turns = record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns
    return encoder.bos + encoder.encode([encoder.render_prompt(turns)])[0]


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
    encoder = Encoder(tokenizer)
    if not encoder.has_template:
        encoder.require_eos()
    stops = {encoder.eos}
    sample = Record((Message("user", "a"), Message("assistant", "b")), "sample")
    for row in encode_all(encoder, [sample], []) if encoder.has_template else ():
        stops.add(row.ids[-1])
    return sorted(stop for stop in stops if stop is not None)


@dataclass(frozen=True)
class Text:
    """A rendered record: its text and, as character spans in it, the answers."""

    record: Record
    text: str
    answers: tuple[tuple[int, int], ...]
    add_eos: bool  # the text has no end-of-turn token after the last answer


@dataclass(frozen=True)
class Row:
    """A tokenised record; ``answers`` are spans in ``ids``."""

    record: Record
    ids: list[int]
    answers: tuple[tuple[int, int], ...]

    @property
    def answer_length(self) -> int:
        """Tokens of the last answer, its end token included."""
        start, end = self.answers[-1]
        return end - start

    def target_flags(self) -> bytearray:
        """1 for each token that is a target."""
        flags = bytearray(len(self.ids))
        for start, end in self.answers:
            flags[start:end] = b"\x01" * (end - start)
        flags[0] = 0  # nothing stands before the first token to predict it from
        return flags


class Encoder:
    """A tokenizer, what is known of its special tokens, and the two ways to lay out a record."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self._special = {*tokenizer.all_special_tokens}
        self._special.update(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.eos: int | None = tokenizer.eos_token_id
        first: list[int] = tokenizer("")["input_ids"][:1]
        self.plain_bos = first if first and first[0] == tokenizer.bos_token_id else []
        self.bos = [] if self.has_template else self.plain_bos  # templates write it themselves
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

    def render(self, record: Record) -> Text:
        """Lay out a whole record and find its answers."""
        if record.plain:
            self.require_eos()
            text = record.turns[0].content
            return Text(record, text, ((0, len(text)),), add_eos=True)
        if not self.has_template:
            self.require_eos()
            prompt = self.render_prompt(record.turns[:-1])
            text = prompt + record.separator + record.turns[-1].content
            return Text(record, text, ((len(prompt), len(text)),), add_eos=True)
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
        return Text(record, text, tuple(answers), add_eos=not ended)

    def cuttable(self, text: Text) -> tuple[int, int]:
        """The characters of the last user turn before the first answer, the part of a prompt that may be shortened."""
        end = text.answers[0][0]
        if not self.has_template or text.record.plain:
            return 0, end
        first_answer = next(i for i, turn in enumerate(text.record.turns) if turn.role == "assistant")
        users = [turn.content.strip() for turn in text.record.turns[:first_answer] if turn.role == "user"]
        start = text.text.rfind(users[-1], 0, end) if users else -1
        return (start, start + len(users[-1])) if start >= 0 else (0, 0)

    def tokenise(self, text: Text, cuts: list[int], ids: list[list[int]]) -> tuple[list[int], list[int]]:
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
        bos = self.plain_bos if text.record.plain else self.bos
        whole = bos + whole
        ends = [len(bos) + end for end in ends]
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


def encode_all(encoder: Encoder, records: Sequence[Record], complaints: list[str]) -> Iterator[Row]:
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
            yield Row(text.record, ids, tuple(zip(ends[::2], ends[1::2], strict=True)))


def fit(row: Row, encoder: Encoder, max_length: int) -> tuple[Row, bool]:
    """Cut prompt until the row fits, if it can; the second value says whether anything was cut."""
    if len(row.ids) <= max_length:
        return row, False
    for shorter in _without_oldest_exchanges(row.record):
        row = next(encode_all(encoder, [shorter], []), row)
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


def _first_difference(one: str, other: str, reach: int = 30) -> str:
    """The place where two texts part, quoted."""
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, shared - reach // 2)
    return f"{one[start : shared + reach]!r} against {other[start : shared + reach]!r}"
