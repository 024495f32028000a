"""Attention functions of a decoding model, in the place where transformers looks for one.

A model's layers call the function that their config names. While an engine runs, that is ours: it gets the new tokens'
queries, keys and values, with positions in, and knows from the engine's `Pass` which tokens of which rows they are. So
the model needs no cache object, no mask and no forward of its own, whatever its family.

In a prompt pass the rows' prompts lie one after another without padding; for attention alone they are laid side by
side, padded at the end, where causality keeps the padding from being seen. Prompts of one length lie so already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fastpeft.errors import UserError
from fastpeft.models.decode.cache import PAGE_SIZE, PagedCache
from fastpeft.ops import paged_attention, paged_store_

NAME = "fastpeft_decode"
_PASS: ContextVar[Pass | None] = ContextVar("fastpeft_decode_pass", default=None)


@dataclass(frozen=True)
class Pass:
    """One forward pass of an engine.

    Attributes:
        cache: keys and values.
        table: ``(rows, row_pages)`` int32, the pages of the rows.
        lengths: ``(rows,)`` int32, tokens that the rows have before this pass; below 0 for idle rows.
        prompts: where the tokens of a prompt pass lie; None for a step, in which each row has one new token.
        needed: the index of the last layer, and the ``(b,)`` places whose output is read from it; None for all.
    """

    cache: PagedCache
    table: Tensor
    lengths: Tensor
    prompts: Prompts | None = None
    needed: tuple[int, Tensor] | None = None

    def needed_of(self, attention: Any) -> Tensor | None:
        """The places that a layer's output is read from; None for all."""
        if self.needed is None or attention.layer_idx != self.needed[0]:
            return None
        return self.needed[1]


@dataclass(frozen=True)
class Prompts:
    """Where the ``t`` tokens of ``b`` prompts lie.

    Attributes:
        count: b.
        longest: tokens of the longest prompt.
        padding: for each place of the padded rows the token there, any for padding, ``(b * longest,)`` int64; and where
            each token is in them, ``(t,)`` int64. None for prompts of one length, which need none.
        pages: ``(t,)`` int32, the page of each token; below 0 for padding that the tokens have among them.
        offsets: ``(t,)`` int32, its place in the page.
    """

    count: int
    longest: int
    padding: tuple[Tensor, Tensor] | None
    pages: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, lengths: list[int], table: Tensor) -> Prompts:
        """Lay out prompts of these lengths, with the pages of their rows ``(b, row_pages)``."""
        device = table.device
        longest = max(lengths)
        sizes = torch.tensor(lengths)
        place = torch.arange(longest).expand(len(lengths), -1)
        is_real = place < sizes[:, None]
        padding = None
        if min(lengths) < longest:
            starts = (sizes.cumsum(0) - sizes)[:, None]
            padded = torch.where(is_real, starts + place, starts).flatten()
            padding = padded.to(device), is_real.flatten().nonzero()[:, 0].to(device)
        rows = torch.arange(len(lengths)).repeat_interleave(sizes).to(device)
        positions = place[is_real].to(device)
        pages = table[rows, positions // PAGE_SIZE]
        return cls(len(lengths), longest, padding, pages, (positions % PAGE_SIZE).int())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over the cache; the arguments are those that transformers gives every attention function.

    Args:
        module: the attention module; its ``layer_idx`` says which layer it is.
        query: ``(b, heads, t, d)`` of the new tokens.
        key: ``(b, kv_heads, t, d)``.
        value: as ``key``.
        attention_mask: None.
        scaling: factor of the scores; None for ``d ** -0.5``.
        sliding_window: tokens that are attended to; None for all.
        softcap: bound of the scores; None for none.
        kwargs: what else a model gives; attention sinks are refused.
    Returns:
        ``(b, t, heads, d)``, and None for the weights.
    """
    now = current_pass()
    assert now is not None, "the attention of a decoding engine outside of it"
    if kwargs.get("s_aux") is not None:
        raise UserError("generate: this model's attention has sinks, which the decoding engine does not know")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cap, window = softcap or 0.0, sliding_window or 0
    layer: Any = module.layer_idx
    k_pages, v_pages = now.cache.layer(layer, key)
    if now.prompts is None:
        q, k, v = (x[:, :, 0] for x in (query, key, value))
        out = paged_attention(
            q, k, v, k_pages, v_pages, now.table, now.lengths, scale=scale, softcap=cap, window=window
        )
        return out[:, None], None
    paged_store_(key[0], value[0], k_pages, v_pages, now.prompts.pages, now.prompts.offsets)
    return _attend_in_prompts(now.prompts, query[0], key[0], value[0], scale, cap, window)[None], None


def _attend_in_prompts(
    prompts: Prompts, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int
) -> Tensor:
    """Attention of packed prompts, ``(heads, t, d)`` each, to ``(t, heads, d)``."""
    padded, real = prompts.padding or (None, None)
    if padded is not None:
        q, k, v = (x[:, padded] for x in (q, k, v))
    q, k, v = (x.unflatten(1, (prompts.count, -1)).transpose(0, 1) for x in (q, k, v))
    out = _causal(q, k, v, scale, softcap, window if window < prompts.longest else 0).transpose(1, 2).flatten(0, 1)
    return out if real is None else out[real]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int) -> Tensor:
    """Causal attention of whole prompts, ``(b, heads, n, d)``."""
    shared = q.shape[1] != k.shape[1]
    if not softcap and not window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    place = torch.arange(q.shape[2], device=q.device)
    seen = place[:, None] >= place
    if window:
        seen = seen & (place[:, None] - place < window)
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=shared)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    return scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def current_pass() -> Pass | None:
    """The engine's pass that is under way here, if there is one."""
    return _PASS.get()


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Let a model's layers call our attention function, in evaluation mode; undone at the end."""
    AttentionInterface.register(NAME, attention)
    modules = list(model.modules())
    configs = {id(c): c for m in modules if "layer_idx" in m.__dict__ and (c := m.__dict__.get("config"))}
    names = {key: config._attn_implementation_internal for key, config in configs.items()}
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = names[key]
        for module in training:
            module.training = True


@contextmanager
def in_pass(now: Pass) -> Iterator[None]:
    """Say which pass is under way."""
    token = _PASS.set(now)
    try:
        yield
    finally:
        _PASS.reset(token)
