"""The chat: what a turn knows, how answers appear, and what does not end it."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from recipes.conftest import make_tokenizer

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.models.decode import Completion, DecodeOptions, Token
from fastpeft.recipes import Chat, converse, load_for_generation
from fastpeft.recipes.schema import ModelConfig


class Scripted:
    """A decoder that says given texts, and keeps what it was asked."""

    kept_bytes = 0

    def __init__(self, tokenizer: Any, answers: Sequence[str]) -> None:
        self._tokenizer, self._answers = tokenizer, iter(answers)
        self.asked: list[str] = []

    def stream(self, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> Iterator[Token]:
        self.asked.append(self._tokenizer.decode(prompts[0]))
        tokens = [*self._tokenizer(next(self._answers))["input_ids"], self._tokenizer.eos_token_id]
        for place, token in enumerate(tokens, start=1):
            yield Token(0, token, math.nan, place == len(tokens), place == len(tokens))

    def generate(self, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> list[Completion]:
        raise AssertionError("a chat streams")

    def release(self) -> None: ...


class Positions:
    """As much of a model as a chat asks for."""

    def __init__(self, positions: int) -> None:
        self.config = type("Config", (), {"max_position_embeddings": positions})()


def scripted(answers: Sequence[str], positions: int = 1000, **options: Any) -> tuple[Chat, Scripted]:
    tokenizer = make_tokenizer()
    decoder = Scripted(tokenizer, answers)
    model: Any = Positions(positions)
    return Chat(model, tokenizer, decoder, **{"max_new_tokens": 8, **options}), decoder


def test_a_turn_knows_those_before_it() -> None:
    chat, decoder = scripted(["One.", "Two.", "Three."])
    assert ["".join(chat.say(text)) for text in ("first", "second")] == ["One.", "Two."]
    turns = "<|start|>user\nfirst<|end|>\n<|start|>assistant\nOne.<|end|>\n<|start|>user\nsecond<|end|>\n"
    assert decoder.asked[1] == turns + "<|start|>assistant\n"
    chat.begin_anew()
    list(chat.say("third"))
    assert decoder.asked[2] == "<|start|>user\nthird<|end|>\n<|start|>assistant\n"


def test_without_a_template_turns_stand_alone() -> None:
    chat, decoder = scripted(["One.", "Two."])
    chat._tokenizer.chat_template = None
    assert not chat.remembers
    for text in ("first", "second"):
        list(chat.say(text))
    assert decoder.asked == ["first", "second"]


def test_the_oldest_turns_make_room() -> None:
    """Of 120 positions the third turn's two exchanges and eight new tokens take more."""
    chat, decoder = scripted(["a" * 20, "b" * 20, "c"], positions=120)
    for text in ("x" * 20, "y" * 20, "z" * 20):
        list(chat.say(text))
    assert "x" not in decoder.asked[2] and "y" * 20 in decoder.asked[2] and "b" * 20 in decoder.asked[2]


def test_pieces_are_whole_characters_and_join_to_the_answer() -> None:
    chat, _ = scripted(["  né 文字 \n"])
    pieces = list(chat.say("say"))
    assert "".join(pieces) == "né 文字" and len(pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces)
    assert chat._turns[1]["content"] == "né 文字"


def test_an_answer_that_is_left_is_not_remembered() -> None:
    chat, decoder = scripted(["One.", "Two."])
    next(iter(chat.say("first")))
    list(chat.say("second"))
    assert "first" not in decoder.asked[1]


def test_a_turn_that_fails_and_an_interrupted_answer_do_not_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(prompt: str) -> Iterator[str]:
        if prompt == "long":
            raise UserError("generate: too long")
        yield "a"
        if prompt == "stop":
            raise KeyboardInterrupt
        yield "b"

    forgotten: list[int] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("long\nstop\n/new\nmore\n"))
    converse(answer, lambda: forgotten.append(1))
    shown = capsys.readouterr()
    assert shown.err == "error: generate: too long\n" and forgotten == [1]
    assert shown.out == "One prompt a line; /new forgets what was said, an empty line ends.\n> > a\n> > ab\n> \n"


def test_the_command_remembers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second turn is what the model says to the whole conversation; on the engine."""
    typed = io.StringIO("Add 1 and 2.\nAdd 2 and 3.\n\n")
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(SystemExit) as left:
        main(["generate", "--model", str(model_folder), "--max-new-tokens", "6"])
    assert not left.value.code
    shown = capsys.readouterr().out
    chat = Chat(*load_for_generation(model=ModelConfig(str(model_folder))), max_new_tokens=6)
    first, second = ("".join(chat.say(text)) for text in ("Add 1 and 2.", "Add 2 and 3."))
    assert shown.endswith(f"an empty line ends.\n> {first}\n> {second}\n> ")
