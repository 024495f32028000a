"""Sampling completions, behind an interface that another engine can fill.

A sampler gets token rows and gives token rows; PPO does not care how. `TransformersSampler` is the one that works with
every model that transformers can generate with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from fastpeft.trainers.forward import base_of


@dataclass(frozen=True)
class Sample:
    """A sampled completion.

    Attributes:
        tokens: its tokens, the stop token included where there is one.
        finished: whether it ends with a stop token.
        logprobs: of the tokens when they were drawn, if the sampler gives them.
    """

    tokens: list[int]
    finished: bool
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        max_new_tokens: tokens a completion may have.
        temperature: divides the logits; 0 takes the likeliest token.
        stop_ids: tokens that end a completion.
        pad_token_id: token that fills rows.
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_token_id: int


class Sampler(Protocol):
    """Draws completions with torch's generator, so that equal states give equal completions."""

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[Sample]:
        """Sample one completion for each prompt, with the adapters of ``model`` that are active."""
        ...


class TransformersSampler:
    """Sample with the model's own ``generate``.

    Args:
        batch_size: prompts at a time.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[Sample]:
        """Sample; see `Sampler`."""
        settings = generation_settings(options)
        was_training = model.training
        model.eval()
        try:
            samples: list[Sample] = []
            for begin in range(0, len(prompts), self._batch_size):
                batch = prompts[begin : begin + self._batch_size]
                ids, mask = _pad_left(batch, options.pad_token_id)
                device = next(model.parameters()).device
                with _quiet():
                    tokens = model.generate(  # type: ignore[operator]
                        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
                    )
                samples += [_sample(row, options.stop_ids) for row in tokens[:, ids.shape[1] :].tolist()]
            return samples
        finally:
            model.train(was_training)


def generation_settings(options: SamplingOptions) -> GenerationConfig:
    """The options as transformers has them, everything stated, so that a model's own defaults change nothing."""
    drawn: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=list(options.stop_ids),
        pad_token_id=options.pad_token_id,
        use_cache=True,
        **drawn,
    )


def _pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask


def _sample(row: list[int], stop_ids: Sequence[int]) -> Sample:
    end = next((index for index, token in enumerate(row) if token in stop_ids), None)
    return Sample(row, False) if end is None else Sample(row[: end + 1], True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of settings that are stated on purpose."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def context_limit(model: nn.Module) -> int | None:
    """Positions that a model has, if it says so."""
    limit = getattr(getattr(base_of(model), "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
