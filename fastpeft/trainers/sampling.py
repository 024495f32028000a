"""Sampling completions for PPO: the decoding engine, behind an interface that another sampler can fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from fastpeft.models.decode import Completion, DecodeOptions, Decoder, make_decoder
from fastpeft.trainers.forward import base_of

_KEPT_SHARE = 0.05  # of a device's memory that a cache may keep while the policy is trained


class Sampler(Protocol):
    """Draws completions with torch's generator, so that equal states give equal completions."""

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> list[Completion]:
        """Sample one completion for each prompt, with the adapters of ``model`` that are active."""
        ...


class EngineSampler:
    """Sample with the decoding engine, or transformers' ``generate`` where the engine cannot take the model.

    The engine's cache and captured steps are kept between calls unless the cache is large: training needs the memory.

    Args:
        batch_size: prompts at a time.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self._batch_size = batch_size
        self._decoder: Decoder | None = None
        self._model: nn.Module | None = None

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> list[Completion]:
        """Sample; see `Sampler`."""
        if self._decoder is None or self._model is not model:
            self._decoder, self._model = make_decoder(model, self._batch_size), model
        found = self._decoder.generate(prompts, options)
        device = next(model.parameters()).device
        if device.type == "cuda":
            most = _KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory
            if self._decoder.kept_bytes > most:
                self._decoder.release()
        return found


def context_limit(model: nn.Module) -> int | None:
    """Positions that a model has, if it says so."""
    limit = getattr(getattr(base_of(model), "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
