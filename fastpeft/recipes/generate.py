"""Answers from a tuned model, with prompts laid out exactly as in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpeft.data import RowTemplate, encode_prompt
from fastpeft.data.json_lines import read_text_lines
from fastpeft.data.records import read_prompt_rows
from fastpeft.data.row_values import RowError
from fastpeft.errors import UserError
from fastpeft.methods import PeftModel
from fastpeft.models.decode import DecodeOptions, Decoder, make_decoder
from fastpeft.recipes.load import load_model
from fastpeft.recipes.paths import is_adapter_folder
from fastpeft.recipes.run_folder import run_sources
from fastpeft.recipes.schema import ModelConfig

Prompt = str | Mapping[str, Any]

_BATCHES_AT_ONCE = 4


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
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    batch_size: int = 8,
    template: RowTemplate | None = None,
) -> Iterator[str]:
    """Answer prompts, in their order.

    Args:
        model: what ``load_for_generation`` gave.
        tokenizer: its tokenizer.
        prompts: the user's text, or rows in a form that training takes; an answer in a row is not read.
        max_new_tokens: tokens an answer may have.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from the softmax of
            ``logits / temperature``, with seeds from torch's generator.
        top_k: how many of the likeliest tokens are drawn from; 0 for all.
        top_p: the mass of the likeliest tokens that are drawn from; 1 for all.
        repetition_penalty: above 1 makes tokens that are there already less likely.
        batch_size: prompts at a time.
        template: what of a row is its prompt; None for rows in a known form.
    Returns:
        The answers as they come, without special tokens and surrounding white space.
    Raises:
        UserError: a prompt cannot be read, or a number is out of range.
    """
    options = decode_options(
        model,
        tokenizer,
        batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )
    rows = encode_prompts(prompts, tokenizer, template)
    return decoded(make_decoder(model, batch_size), tokenizer, rows, options, batch_size)


def decode_options(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, **stated: Any
) -> DecodeOptions:
    """Options that end answers where the tokenizer or the model would, checked.

    Args:
        model: whose end-of-sequence tokens count too.
        tokenizer: its tokenizer.
        batch_size: prompts at a time.
        stated: fields of `DecodeOptions`.
    Raises:
        UserError: a number is out of range.
    """
    if batch_size < 1:
        raise UserError(f"generate: batch_size is {batch_size}; it must be at least 1")
    options = DecodeOptions(**stated, stop_ids=tuple(_stop_tokens(model, tokenizer)))
    options.check()
    return options


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, template: RowTemplate | None = None
) -> list[list[int]]:
    """Tokens of prompts as training lays them out.

    Args:
        prompts: texts, which are prompts as they stand, and rows.
        tokenizer: the one used in training.
        template: what of a row is its prompt; None for rows in a known form.
    Raises:
        UserError: a prompt cannot be read; the message has its number.
    """
    return [_encode(prompt, number, tokenizer, template) for number, prompt in enumerate(prompts, start=1)]


def _encode(prompt: Prompt, number: int, tokenizer: PreTrainedTokenizerBase, template: RowTemplate | None) -> list[int]:
    try:
        if template is None or isinstance(prompt, str):
            return encode_prompt(prompt, tokenizer)
        return encode_prompt(template.parse(prompt, "", for_prompt=True), tokenizer)
    except RowError as error:
        raise UserError(f"generate: prompt {number}: {error}") from error
    except UserError as error:
        raise UserError(f"generate: prompt {number}: {str(error).removeprefix('encode_prompt: ')}") from error


def decoded(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    options: DecodeOptions,
    batch_size: int,
) -> Iterator[str]:
    """Texts that rows of tokens are continued with, as they come.

    As many prompts to a call as keep the decoder's rows full, and few enough for answers to come early.
    """
    for some in in_calls(rows, batch_size):
        for completion in decoder.generate(some, options):
            yield str(tokenizer.decode(completion.tokens, skip_special_tokens=True)).strip()


def in_calls(rows: Sequence[list[int]], batch_size: int) -> Iterator[Sequence[list[int]]]:
    """The rows of one call of a decoder after another."""
    at_once = _BATCHES_AT_ONCE * batch_size
    for first in range(0, len(rows), at_once):
        yield rows[first : first + at_once]


def read_prompts(path: str | Path, template: RowTemplate | None = None) -> list[Prompt]:
    """Read prompts from a file.

    Args:
        path: ``.jsonl``: rows in a form that training takes, with or without answers; else text, one prompt a line.
        template: what of a row is its prompt; None for rows in a known form.
    Raises:
        UserError: the file cannot be read, holds no prompt, or a row has none; the message names the line.
    """
    path = Path(path)
    rows: Sequence[Prompt]
    rows = read_prompt_rows(path, template) if path.suffix == ".jsonl" else read_text_lines(path)
    prompts = [*rows]
    if not prompts:
        raise UserError(f"generate: {path} holds no prompt")
    return prompts


def _stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of the model."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None})
