"""A chat on a terminal: turns follow one another, and an answer appears while it is drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpeft.errors import UserError
from fastpeft.models.decode import Decoder, make_decoder
from fastpeft.recipes.generate import Prompt, decode_options, encode_prompts
from fastpeft.trainers.sampling import context_limit

_ANEW = "/new"
_UNFINISHED = "\ufffd"  # what bytes of a character that is not yet whole decode to


class Chat:
    """A conversation with one model.

    With a chat template each turn knows those before it; the oldest are left out when they no longer fit into the
    model's positions. Without one, each turn stands alone.

    Args:
        model: what ``load_for_generation`` gave.
        tokenizer: its tokenizer.
        decoder: of this model; None makes one.
        options: those of ``generate_answers``.
    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, decoder: Decoder | None = None, **options: Any
    ) -> None:
        self._options = decode_options(model, tokenizer, 1, **options)
        self._tokenizer = tokenizer
        self._decoder = decoder or make_decoder(model, 1)
        self._limit = context_limit(model)
        self._turns: list[dict[str, str]] = []

    @property
    def remembers(self) -> bool:
        """Whether turns know those before them."""
        return self._tokenizer.chat_template is not None

    def begin_anew(self) -> None:
        """Forget what was said."""
        self._turns = []

    def say(self, text: str) -> Iterator[str]:
        """Answer a turn.

        Args:
            text: the user's.
        Returns:
            Pieces of the answer as they come, without special tokens. The turn is remembered once all were taken.
        Raises:
            UserError: the turn alone is too long for the model.
        """
        asked = {"role": "user", "content": text}
        tokens: list[int] = []
        shown = ""
        for token in self._decoder.stream([self._encode(asked)], self._options):
            tokens.append(token.token)
            so_far = str(self._tokenizer.decode(tokens, skip_special_tokens=True)).lstrip()
            if token.ends:
                so_far = so_far.rstrip()
            elif so_far.endswith(_UNFINISHED) or so_far[-1:].isspace():
                continue  # white space waits for what follows: at the end there is none
            if len(so_far) > len(shown):
                yield so_far[len(shown) :]
                shown = so_far
        if self.remembers:
            self._turns += [asked, {"role": "assistant", "content": shown}]

    def _encode(self, asked: dict[str, str]) -> list[int]:
        """Tokens of a turn and as many before it as fit."""
        while True:
            prompt: Prompt = {"messages": [*self._turns, asked]} if self.remembers else asked["content"]
            ids = encode_prompts([prompt], self._tokenizer)[0]
            if not self._turns or self._limit is None or len(ids) + self._options.max_new_tokens <= self._limit:
                return ids
            self._turns = self._turns[2:]


def converse(answer: Callable[[str], Iterable[str]], begin_anew: Callable[[], None] | None = None) -> None:
    """Ask for a prompt and print its answer until an empty line or the end of input.

    A turn that cannot be answered is complained of, and Ctrl-C ends an answer; the chat goes on after both.

    Args:
        answer: from a prompt to the pieces of its answer.
        begin_anew: what ``/new`` calls; None where turns stand alone.
    """
    forgets = "" if begin_anew is None else f"{_ANEW} forgets what was said, "
    print(f"One prompt a line; {forgets}an empty line ends.")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if not prompt:
            return
        if begin_anew is not None and prompt == _ANEW:
            begin_anew()
            continue
        try:
            for piece in answer(prompt):
                print(piece, end="", flush=True)
            print(flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(flush=True)
