"""Answers from a tuned model, with prompts laid out exactly as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastpeft.data import encode_prompt
from fastpeft.data.records import read_prompt_rows, read_text_lines
from fastpeft.errors import UserError
from fastpeft.methods import PeftModel
from fastpeft.recipes.load import load_model, quiet
from fastpeft.recipes.paths import is_adapter_folder
from fastpeft.recipes.run_folder import run_sources
from fastpeft.recipes.schema import ModelConfig

Prompt = str | Mapping[str, Any]


def load_for_generation(
    run: str | Path | None = None,
    *,
    model: ModelConfig | None = None,
    adapter: str | Path | None = None,
    untuned: bool = False,
    device: torch.device | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a run's model for generation, or a base model with an adapter.

    Args:
        run: a run folder; its ``config.yaml`` says which base model and how it is held in memory.
        model: a base model, instead of a run.
        adapter: an adapter folder, such as a checkpoint's; None takes the run's.
        untuned: the base model alone.
        device: where to; None takes the GPU when there is one.
    Returns:
        The model in evaluation mode and its tokenizer.
    Raises:
        UserError: not exactly one of ``run`` and ``model``, or the folder holds nothing to load.
    """
    if (run is None) == (model is None):
        raise UserError("generate: give either a run folder or a base model (--model)")
    if run is not None:
        model, found = run_sources(Path(run), "generate", tuned=adapter is None and not untuned)
        adapter = adapter or found
    assert model is not None
    if adapter is not None and not untuned and not is_adapter_folder(adapter):
        raise UserError(f"generate: {adapter} is not an adapter folder: there is no adapter_config.json in it")
    base, tokenizer = load_model(model, device)
    if adapter is None or untuned:
        return base, tokenizer
    return PeftModel.from_pretrained(base, str(adapter)).eval(), tokenizer


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    batch_size: int = 8,
) -> Iterator[str]:
    """Answer prompts, in batches and in their order.

    Args:
        model: what ``load_for_generation`` gave.
        tokenizer: its tokenizer.
        prompts: the user's text, or rows in a form that training takes; an answer in a row is not read.
        max_new_tokens: tokens an answer may have.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from the softmax of
            ``logits / temperature`` with torch's generator.
        batch_size: prompts at a time.
    Returns:
        The answers as they come, without special tokens and surrounding white space.
    Raises:
        UserError: a prompt cannot be read, or a number is out of range.
    """
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        raise UserError(
            f"generate: max_new_tokens={max_new_tokens} and batch_size={batch_size} have to be at least 1, "
            f"temperature={temperature} at least 0"
        )
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        # Stated, so that a model's own generation_config cannot make greedy decoding something else.
        repetition_penalty=1.0,
        eos_token_id=_stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    rows = [_encode(prompt, number, tokenizer) for number, prompt in enumerate(prompts, start=1)]
    return _answers(model, tokenizer, rows, settings, batch_size)


def _encode(prompt: Prompt, number: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return encode_prompt(prompt, tokenizer)
    except UserError as error:
        raise UserError(f"generate: prompt {number}: {str(error).removeprefix('encode_prompt: ')}") from error


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    settings: GenerationConfig,
    batch_size: int,
) -> Iterator[str]:
    device = next(model.parameters()).device
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(batch):  # padded on the left: answers begin at one column
            ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
        with torch.no_grad(), quiet():
            tokens = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
            answers = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        yield from (answer.strip() for answer in answers)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a file.

    Args:
        path: ``.jsonl``: rows in a form that training takes, with or without answers; else text, one prompt a line.
    Raises:
        UserError: the file cannot be read, holds no prompt, or a row has none; the message names the line.
    """
    path = Path(path)
    prompts: list[Prompt] = [*(read_prompt_rows(path) if path.suffix == ".jsonl" else read_text_lines(path))]
    if not prompts:
        raise UserError(f"generate: {path} holds no prompt")
    return prompts


def converse(answer: Callable[[str], str]) -> None:
    """Ask for a prompt and print its answer until an empty line or the end of input; each turn stands alone.

    Args:
        answer: from a prompt to its answer.
    """
    print("One prompt a line; an empty line ends.")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if not prompt:
            return
        print(answer(prompt), flush=True)


def _stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of the model."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None})
