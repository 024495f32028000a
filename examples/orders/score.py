"""Greedy answers in batches, and how many of them are exactly right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from fastpeft.data import encode_prompt, stop_token_ids

Row = dict[str, str]


@dataclass(frozen=True)
class Score:
    """Exact matches among some rows, and among those whose wording training never saw."""

    rows: int
    correct: int
    unseen_rows: int
    unseen_correct: int

    def __str__(self) -> str:
        told = f"{self.correct} of {self.rows} ({self.correct / self.rows:.1%})"
        if self.unseen_rows:
            told += f", of the unseen wordings {self.unseen_correct} of {self.unseen_rows}"
        return told


class Hopeless(StoppingCriteria):
    """Ends an answer at the first text that is not the beginning of the expected one: it cannot match any more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, expected: Sequence[str]) -> None:
        self._tokenizer, self._width, self._expected = tokenizer, width, expected

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Say of each row whether it is over."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._width :], skip_special_tokens=True)
        over = [not e.startswith(t) for e, t in zip(self._expected, texts, strict=True)]
        return torch.tensor(over, device=input_ids.device)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def contiguous_output_input(model: Any) -> Iterator[None]:
    """Give the output layer contiguous rows while a block runs.

    Generation hands it the last position of each row, a strided slice; for that, torch 2.13 on a CPU copies the whole
    output weight once a row: 57 MB each here, half the time of reading the prompts.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 100,
    until_wrong: bool = False,
) -> list[str]:
    """The likeliest answer to each row, token by token.

    Args:
        model: a causal language model; it is left in evaluation mode.
        tokenizer: its tokenizer.
        rows: with an ``input``, and for ``until_wrong`` an ``output``.
        max_new_tokens: where an answer is cut off.
        batch_size: rows at a time; rows of like length go together.
        until_wrong: stop an answer as soon as it differs from the row's output, which saves an untuned model most of
            the time and cannot make a wrong answer right.
    """
    model.eval()
    device = next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = [""] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["input"]))
    for first in range(0, len(rows), batch_size):
        batch = by_length[first : first + batch_size]
        prompts = [encode_prompt(rows[index], tokenizer) for index in batch]
        width = max(map(len, prompts))
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for i, prompt in enumerate(prompts):  # padded on the left: all answers begin at one column
            input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        expected = [rows[index]["output"] for index in batch]
        stop = StoppingCriteriaList([Hopeless(tokenizer, width, expected)] if until_wrong else [])
        with torch.inference_mode(), contiguous_output_input(model):
            tokens = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                stopping_criteria=stop,
            )
        for index, text in zip(batch, tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True), strict=True):
            answers[index] = text
    return answers


def score(answers: Sequence[str], rows: Sequence[Row], unseen: Sequence[str] = ()) -> Score:
    """Count the answers that equal the rows' outputs, character for character."""
    right = [given == row["output"] for given, row in zip(answers, rows, strict=True)]
    right_unseen = [hit for hit, row in zip(right, rows, strict=True) if row.get("template") in unseen]
    return Score(len(right), sum(right), len(right_unseen), sum(right_unseen))
