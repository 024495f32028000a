"""The decoder of last resort: transformers' own ``generate`` behind the engine's interface, and the choice of one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from fastpeft.models.decode.engine import CannotDecode, DecodeEngine, Token
from fastpeft.models.decode.options import Completion, DecodeOptions


class Decoder(Protocol):
    """Continues prompts."""

    def generate(self, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> list[Completion]:
        """Continue prompts, in their order; see `DecodeEngine.generate`."""
        ...

    def stream(self, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> Iterator[Token]:
        """Continue prompts, token by token; see `DecodeEngine.stream`."""
        ...

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept between calls."""
        ...

    def release(self) -> None:
        """Give it back."""
        ...


def make_decoder(model: nn.Module, max_batch: int = 64) -> Decoder:
    """The engine, or where it cannot take a model transformers' ``generate``, with a warning that says why.

    Args:
        model: a causal language model, with or without adapters.
        max_batch: prompts at a time.
    """
    try:
        return DecodeEngine(model, max_batch=max_batch)
    except CannotDecode as reason:
        warnings.warn(f"{reason}: decoding with it, more slowly", stacklevel=2)
        return TransformersDecoder(model, max_batch)


class TransformersDecoder:
    """Decode with the model's own ``generate``; completions come without log-probabilities.

    Args:
        model: any model that transformers can generate with.
        max_batch: prompts at a time.
    """

    def __init__(self, model: nn.Module, max_batch: int = 64) -> None:
        self._model: Any = model
        self._max_batch = max_batch

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> list[Completion]:
        """Continue prompts; see `DecodeEngine.generate`."""
        options.check()
        settings, modes = _settings(options), [(module, module.training) for module in self._model.modules()]
        device = next(self._model.parameters()).device
        self._model.eval()
        try:
            found: list[Completion] = []
            with nullcontext() if options.seed is None else torch.random.fork_rng():
                if options.seed is not None:
                    torch.manual_seed(options.seed)
                for begin in range(0, len(prompts), self._max_batch):
                    ids, mask = _pad_left(prompts[begin : begin + self._max_batch])
                    with _quiet():
                        tokens = self._model.generate(
                            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
                        )
                    found += [_completion(row, options.stop_ids) for row in tokens[:, ids.shape[1] :].tolist()]
            return found
        finally:
            for module, training in modes:
                module.training = training

    def stream(self, prompts: Sequence[Sequence[int]], options: DecodeOptions) -> Iterator[Token]:
        """Continue prompts; their tokens come when all are drawn, without log-probabilities."""
        for index, found in enumerate(self.generate(prompts, options)):
            for place, token in enumerate(found.tokens, start=1):
                ends = place == len(found.tokens)
                yield Token(index, token, math.nan, ends, ends and found.finished)

    @property
    def kept_bytes(self) -> int:
        """None."""
        return 0

    def release(self) -> None:
        """Nothing is kept."""


def _settings(options: DecodeOptions) -> GenerationConfig:
    """The options as transformers has them, everything stated, so that a model's own defaults change nothing."""
    drawn: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        drawn = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens or None,
        repetition_penalty=options.repetition_penalty,
        eos_token_id=list(options.stop_ids) or None,
        pad_token_id=options.stop_ids[0] if options.stop_ids else 0,
        use_cache=True,
        **drawn,
    )


def _pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask


def _completion(row: list[int], stop_ids: Sequence[int]) -> Completion:
    end = next((index for index, token in enumerate(row) if token in stop_ids), None)
    return Completion(row, None, False) if end is None else Completion(row[: end + 1], None, True)


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
