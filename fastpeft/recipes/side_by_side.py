"""Answers of several adapters beside each other: one base in memory, and the adapters take turns on it.

An adapter is called by the end of its path that tells it from the others: ``tea`` and ``coffee``, or ``a/adapter`` and
``b/adapter``. The base's own answers are called ``untuned``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpeft.data import RowTemplate
from fastpeft.errors import UserError
from fastpeft.methods import PeftModel
from fastpeft.models.decode import Decoder, make_decoder
from fastpeft.recipes.chat import converse
from fastpeft.recipes.generate import (
    Prompt,
    decode_options,
    decoded,
    encode_prompts,
    in_calls,
    load_for_generation,
)
from fastpeft.recipes.paths import is_adapter_folder
from fastpeft.recipes.run_folder import run_sources
from fastpeft.recipes.schema import ModelConfig
from fastpeft.recipes.short_names import short_names

UNTUNED = "untuned"


@dataclass(frozen=True)
class SideBySide:
    """One model that answers in several ways.

    Attributes:
        model: the base with every adapter.
        tokenizer: its tokenizer.
        names: what an adapter is called in the model, by its label; None for the base alone.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    names: Mapping[str, str | None]

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        batch_size: int = 8,
        decoder: Decoder | None = None,
        template: RowTemplate | None = None,
        **options: Any,
    ) -> Iterator[dict[str, str]]:
        """Answer prompts in every way, in their order.

        Args:
            prompts: as for ``generate_answers``.
            batch_size: prompts at a time.
            decoder: of this model, to go on with; None makes one.
            template: as for ``generate_answers``.
            options: the others of ``generate_answers``. With a temperature every adapter has the same draws, so that
                answers differ by what the adapters learned, and are those that each gives alone.
        Returns:
            For each prompt the answers by label.
        Raises:
            UserError: a prompt cannot be read, or a number is out of range.
        """
        checked = decode_options(self.model, self.tokenizer, batch_size, **options)
        rows = encode_prompts(prompts, self.tokenizer, template)
        decoder = decoder or make_decoder(self.model, batch_size)

        def each() -> Iterator[dict[str, str]]:
            for some in in_calls(rows, batch_size):
                found: list[list[str]] = []
                for turn, name in enumerate(self.names.values(), start=1):
                    with ExitStack() as stack:
                        if turn < len(self.names):  # the last one moves the generator on for all
                            stack.enter_context(torch.random.fork_rng(_gpus(self.model)))
                        if name is None:
                            stack.enter_context(self.model.disable_adapter())
                        else:
                            self.model.set_adapter(name, inference_mode=True)
                        found.append(list(decoded(decoder, self.tokenizer, some, checked, batch_size)))
                yield from (dict(zip(self.names, texts, strict=True)) for texts in zip(*found, strict=True))

        return each()


def load_side_by_side(
    run: str | Path | None = None,
    *,
    model: ModelConfig | None = None,
    adapters: Sequence[str | Path],
    untuned: bool = False,
    device: torch.device | None = None,
) -> SideBySide:
    """Load a base model once, with several adapters, whose kinds may differ.

    Args:
        run: a run folder, whose base is taken; its own adapter is not, unless it is named.
        model: a base model, instead of a run.
        adapters: adapter folders.
        untuned: let the base answer too.
        device: where to; None takes the GPU when there is one.
    Returns:
        The model in evaluation mode, with the labels of its ways to answer in the order given, the base first.
    Raises:
        UserError: nothing to compare, a folder given twice or without an adapter, an adapter of another base, or one
            that changes weights of the base, which the others use.
    """
    folders = [Path(folder) for folder in adapters]
    if not folders:
        raise UserError("generate: no adapter was given to answer side by side; give --adapter")
    for folder in folders:
        if not is_adapter_folder(folder):
            raise UserError(f"generate: {folder} is not an adapter folder: there is no adapter_config.json in it")
    labels = short_names(folders, "generate: the adapter", taken=[UNTUNED] if untuned else [])
    names = [f"{re.sub('[^A-Za-z0-9_-]', '_', label)}_{index}" for index, label in enumerate(labels)]
    if run is not None and model is None:
        model, run = run_sources(Path(run), "generate", tuned=False)[0], None
    base, tokenizer = load_for_generation(run, model=model, untuned=True, device=device)
    before = [(parameter, parameter._version) for parameter in base.parameters()]
    alone = len(folders) == 1 and not untuned
    wrapped: PeftModel | None = None
    for folder, name in zip(folders, names, strict=True):
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        else:
            wrapped.load_adapter(str(folder), name)
        # Trained biases, and embeddings saved with an adapter whose vocabulary was resized, are values of the base.
        if not alone and any(parameter._version != version for parameter, version in before):
            raise UserError(
                f"generate: {folder} changes weights of the base model itself (biases that were trained, or embeddings "
                "of a resized vocabulary), so that no other answer can be had beside it; give it as the only "
                "--adapter, without --untuned"
            )
    assert wrapped is not None
    ways: dict[str, str | None] = {UNTUNED: None} if untuned else {}
    return SideBySide(wrapped.eval(), tokenizer, ways | dict(zip(labels, names, strict=True)))


def print_answers(ways: SideBySide, prompts: Sequence[Prompt] | None, *, batch_size: int, **options: Any) -> None:
    """Print answers: rows as JSONL, texts as tables on a terminal and else as lines with labels.

    Args:
        ways: what answers.
        prompts: the prompts, one kind of them; None asks for one after another.
        batch_size: prompts at a time.
        options: as for `SideBySide.answers`.
    """
    if prompts is None:
        decoder = make_decoder(ways.model, 1)
        converse(lambda line: [as_lines(next(ways.answers([line], batch_size=1, decoder=decoder, **options)))])
        return
    show = table_printer() if sys.stdout.isatty() else None
    every = ways.answers(prompts, batch_size=batch_size, **options)
    for number, (asked, answers) in enumerate(zip(prompts, every, strict=True)):
        if not isinstance(asked, str):
            print(json.dumps({**asked, "generated": answers}, ensure_ascii=False), flush=True)
        elif show is not None:
            show(asked, answers)
        else:
            print("\n" * (number > 0) + as_lines(answers), flush=True)


def table_printer(width: int | None = None) -> Callable[[Prompt, Mapping[str, str]], None]:
    """Print answers as a table with a column for each way, for a terminal.

    Args:
        width: in characters; None for the terminal's.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=width)

    def show(prompt: Prompt, answers: Mapping[str, str]) -> None:
        table = Table(title=Text(prompt) if isinstance(prompt, str) else None, title_justify="left", expand=True)
        for label in answers:
            table.add_column(Text(label), ratio=1, overflow="fold")
        table.add_row(*map(Text, answers.values()))  # as Text: square brackets in an answer are no markup
        console.print(table)

    return show


def as_lines(answers: Mapping[str, str]) -> str:
    """Answers as ``label: answer``, with further lines of an answer set in."""
    return "\n".join(f"{label}: " + answer.replace("\n", "\n    ") for label, answer in answers.items())


def _gpus(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
