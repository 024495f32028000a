"""How many tokens texts have, counted word by word: several times as fast as to tokenise them.

A tokenizer makes the tokens of a word from the word alone, and words come again and again. So a text is cut where no
token can reach across: before a single space between two other characters, and behind a single line's end. Whether that
is so is asked of the vocabulary and of a sample; where it is not so, every text is tokenised as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from fastpeft.data.forms import Message, Record
from fastpeft.data.row_values import RowError
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastpeft.data.layout import Encoder

_INK = r"!-~\u00a1-\u1679\u1681-\u1fff\u3001-\ud7ff\uf900-\U0010ffff"  # surely no white space, to any tokenizer
_CUT = re.compile(rf"(?<=[{_INK}])(?= [{_INK}])|(?<=[{_INK}]\n)(?=[{_INK}])")
# What is not one space or one line's end between ink; it stays with what stands beside it.
_GAP = re.compile(rf"([^{_INK}]{{2,}}|[^ \n{_INK}]|\A[^{_INK}]|[^{_INK}]\Z)")
_ODD = r"\t\r\v\f\x1c-\x1f"
_ASCII_GAP = re.compile(rf"([ \n{_ODD}](?:[ \n{_ODD}]+|(?<=[{_ODD}])))")  # the same, found faster
_OTHER_GAPS = ("  ", " \n", "\n ", "\n\n\n", *"\t\r\v\f\x1c\x1d\x1e\x1f")
_ENDS = ("", " ", "\n")
_KEPT = 300_000  # words in the cache: 40 MB
_SAMPLE = (
    "The quick (brown) fox's 2nd\nde-fault: x = {'a': 12.5};\n\n\tend. Über 日本 語\r\n\r\nlast  two   spaces\n  in"
)


def is_cut(text: str, at: int) -> bool:
    """Whether no token reaches over this place of a text."""
    return at == 0 or _CUT.match(text, at) is not None


class TokenCounter:
    """Counts tokens of texts.

    Args:
        encoder: encodes what was not met before.
        tokenizer: its vocabulary says whether texts may be cut.

    ``alone`` are tokens of the chat template that keep the texts on their two sides apart.
    """

    def __init__(self, encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = encoder
        self.alone = _tokens_alone(encoder, tokenizer)
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._counts: dict[str, int] = {}
        self.by_words = _tokens_keep_to_words(tokenizer) and self._agrees([_SAMPLE, f" {_SAMPLE}", f"\n{_SAMPLE}\n"])

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without those that a tokenizer adds by itself."""
        if not self.by_words:
            return [len(ids) for ids in self._encoder.encode(list(texts))]
        return self._count(texts)

    def _count(self, texts: Sequence[str]) -> list[int]:
        words = [self._words(text) for text in texts]
        counts = self._counts
        new = [word for word in set(chain.from_iterable(words)) if word not in counts]
        found = dict(zip(new, self._encoded(new), strict=True))
        if len(counts) + len(found) > _KEPT:
            counts.clear()
            forgotten = [word for word in set(chain.from_iterable(words)) if word not in found]
            found.update(zip(forgotten, self._encoded(forgotten), strict=True))
        counts.update(found)
        return [sum(map(counts.__getitem__, row)) for row in words]

    def _words(self, text: str) -> list[str]:
        """Cut a text; string methods are several times as fast as a pattern."""
        if "\0" in text:
            return [text]
        plain = text.isascii() and text[:1] not in _ENDS and text[-1:] not in _ENDS
        if plain and not any(gap in text for gap in _OTHER_GAPS):
            first, *parts = text.split("\n\n")
            gaps = ["\n\n"] * len(parts)
        else:
            first, *rest = (_ASCII_GAP if plain else _GAP).split(text)
            gaps, parts = rest[::2], rest[1::2]
        words = self._cut(first)
        for gap, part in zip(gaps, parts, strict=True):
            head, *others = self._cut(part)
            words[-1] += gap + head
            words += others
        return words

    def _cut(self, text: str) -> list[str]:
        text = text.replace(" ", "\0 ").replace("\n", "\n\0")
        for token in self.alone:
            text = text.replace(token, f"\0{token}\0")
        return text.split("\0")

    def _encoded(self, words: list[str]) -> list[int]:
        """Tokens of words by the tokenizer itself; without its bookkeeping, which takes longer than a short word."""
        if self._backend is None:
            return [len(ids) for ids in self._encoder.encode(words)]
        return [len(found) for found in self._backend.encode_batch_fast(words, add_special_tokens=False)]

    def _agrees(self, texts: Sequence[str]) -> bool:
        return self._count(texts) == [len(ids) for ids in self._encoder.encode(list(texts))]


def _tokens_alone(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens of the chat template that are taken out of a text first, and leave what stands beside them as it is."""
    try:
        turns = (Message("user", "a"), Message("assistant", "b"))
        text = encoder.render(Record(turns, "probe")).text
    except (RowError, UserError):
        return []
    return [
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if not (token.lstrip or token.rstrip or token.single_word or token.normalized) and str(token) in text
    ]


def _tokens_keep_to_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether no token of the vocabulary has a cut in it; byte-level and SentencePiece write spaces as letters."""
    spaces = {0x100 + byte: chr(byte) for byte in (9, 10, 11, 12, 13, 32)} | {0x2581: " "}
    return not any(_CUT.search(token.translate(spaces), 1) for token in tokenizer.get_vocab())
