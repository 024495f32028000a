"""Forwards over fused ops, which take the place of a module's own on that one instance.

Each is written over a structure (`fastpeft.models.structure`) that lies beside it on the module, under `STRUCTURE`. The
parts are looked up when they are used, so that adapters may be put in or taken out at any time. A forward hands over to
the class's own wherever it was not made for the case: a cache, positional arguments, weights of another dtype.

A layer's work is cut in two, before and after attention, so that `checkpointing` can recompute either alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastpeft.models.decode.attention import Pass, current_pass
from fastpeft.models.replay import add_product, product_of, quantized, sharing, together
from fastpeft.models.structure import MLP, Attention, Layer, Norm
from fastpeft.nn.gated import gated
from fastpeft.ops import nf4_linear_group, paged_attention, rms_norm, rope
from fastpeft.ops.glu import glu_consuming

STRUCTURE = "_fastpeft"
CHECKPOINTING = "_fastpeft_checkpointing"
CACHES = ("cache", "past_key_values", "past_key_value")


class Tape(Protocol):
    """Runs a layer's linear layers in place of a plain call; `checkpointing` has one that remembers."""

    def linear(self, owner: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        """Apply the linear layers that stand in ``owner`` under ``names``."""

    def owns(self, names: tuple[str, ...]) -> bool:
        """Whether the outputs of these layers are made for one backward, which may write over them."""


def project(owner: nn.Module, names: tuple[str, ...], x: Tensor, tape: Tape | None = None) -> list[Tensor]:
    """Apply several linear layers of a module to one input, together where they can share it: LoRA, or bare NF4."""
    if tape is not None:
        return tape.linear(owner, names, x)
    if len(names) > 1:
        products = [product_of(owner._modules[name]) for name in names]
        if (adapted := sharing(products)) is not None:
            return together(adapted, x)
        if (weights := quantized(products)) is not None:
            return nf4_linear_group(x, weights)
    return [getattr(owner, name)(x) for name in names]


def _on_structure(fused: Callable[..., Any]) -> Callable[..., Any]:
    """Give a forward the structure that lies on its module; without one, run the class's own."""

    @functools.wraps(fused)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        structure = self.__dict__.get(STRUCTURE)
        if structure is None:
            return type(self).forward(self, *args, **kwargs)
        return fused(self, structure, *args, **kwargs)

    return forward


# --- norms ---
@_on_structure
def norm_forward(self: nn.Module, norm: Norm, hidden_states: Tensor) -> Tensor:
    """An RMS norm."""
    weight: Any = self.weight
    if hidden_states.dtype != weight.dtype:
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    out: Tensor = rms_norm(hidden_states, weight, norm.eps, offset=norm.offset, cast_first=norm.cast_first)
    return out


def add_norm(module: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of a sum, and the sum; in one pass over memory where the norm is a plain RMS norm."""
    norm, weight = module.__dict__.get(STRUCTURE), getattr(module, "weight", None)
    if (
        not isinstance(norm, Norm)
        or not isinstance(weight, Tensor)
        or not x.dtype == residual.dtype == weight.dtype
        or has_hooks(module)
    ):
        total = residual + x
        return module(total), total
    both: tuple[Tensor, Tensor] = rms_norm(
        x, weight, norm.eps, offset=norm.offset, cast_first=norm.cast_first, residual=residual
    )
    return both


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to be told of the module's calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


# --- MLP ---
@_on_structure
def mlp_forward(self: nn.Module, structure: MLP, x: Tensor) -> Tensor:
    """A gated MLP."""
    return apply_mlp(self, structure, x)


def apply_mlp(mlp: nn.Module, structure: MLP, x: Tensor) -> Tensor:
    """The whole MLP."""
    return project(mlp, ("down_proj",), mlp_hidden(mlp, structure, x))[0]


def mlp_hidden(mlp: nn.Module, structure: MLP, x: Tensor, tape: Tape | None = None) -> Tensor:
    """What the down-projection of a gated MLP reads."""
    outputs = project(mlp, structure.projections, x, tape)
    gate, up = outputs if len(outputs) == 2 else (outputs[0], None)
    if tape is not None and tape.owns(structure.projections):
        return glu_consuming(gate, up, structure.activation)
    return gated(gate, up, structure.activation)


# --- attention ---
@_on_structure
def attention_forward(
    self: nn.Module, structure: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attention; generation with its cache, where nothing is to be differentiated, is left to the class."""
    positions = kwargs.get("position_embeddings")
    name, cache = next(((n, kwargs[n]) for n in CACHES if kwargs.get(n) is not None), ("", None))
    if args or positions is None or (cache is not None and not torch.is_grad_enabled()):
        own: tuple[Tensor, Any] = type(self).forward(self, hidden_states, *args, **kwargs)
        return own
    now = current_pass()
    if now is not None and now.prompts is None:
        return project(self, ("o_proj",), _decode_step(self, structure, hidden_states, positions, now))[0], None
    rest = {key: value for key, value in kwargs.items() if key not in ("position_embeddings", *CACHES)}
    q, k, v = query_key_value(self, structure, hidden_states, positions)
    if cache is not None:  # transformers makes one in training too; since it calls it cache, it tells it its arguments
        k, v = cache.update(k, v, self.layer_idx, **({"kwargs": rest} if name == "cache" else {}))
    out, weights = attend(self, structure, q, k, v, **rest)
    return project(self, ("o_proj",), out)[0], weights


def query_key_value(
    attention: nn.Module, structure: Attention, x: Tensor, positions: tuple[Tensor, Tensor], tape: Tape | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads that attention reads, ``(b, heads, t, head_dim)``, with their positions in."""
    q, k, v = _heads(attention, structure, x, tape)
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), *positions)
    return q, k, v.transpose(1, 2)


def _heads(
    attention: nn.Module, structure: Attention, x: Tensor, tape: Tape | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads before they get their positions, ``(b, t, heads, head_dim)``."""
    outputs = project(attention, structure.projections, x, tape)
    if len(outputs) == 1:
        outputs = list(outputs[0].split(structure.widths, dim=-1))
    q, k, v = (out.unflatten(-1, (-1, structure.head_dim)) for out in outputs)
    if structure.norms:
        q, k = attention.q_norm(q), attention.k_norm(k)  # type: ignore[operator]
    return q, k, v


def _decode_step(
    attention: nn.Module, structure: Attention, x: Tensor, positions: tuple[Tensor, Tensor], now: Pass
) -> Tensor:
    """What the output layer reads of a decoding engine's step, ``(rows, 1, features)``: positions, cache and attention
    are one launch.
    """
    q, k, v = (heads[:, 0] for heads in _heads(attention, structure, x))
    k_pages, v_pages = now.cache.layer(attention.layer_idx, k[:, :, None])  # type: ignore[arg-type]
    cos, sin = (angles.expand(x.shape[0], -1, -1)[:, 0] for angles in positions)
    options = structure.options
    out: Tensor = paged_attention(
        q,
        k,
        v,
        k_pages,
        v_pages,
        now.table,
        now.lengths,
        scale=options["scaling"],
        angles=(cos, sin),
        softcap=options.get("softcap") or 0.0,
        window=options.get("sliding_window") or 0,
    )
    return out.flatten(1)[:, None]


def attend(
    attention: nn.Module,
    structure: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run the model's own attention function: SDPA, FlashAttention or whatever its config names."""
    home: Any = sys.modules[structure.home]
    name = attention.config._attn_implementation  # type: ignore[union-attr]
    function = home.ALL_ATTENTION_FUNCTIONS.get_interface(name, home.eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    out, weights = function(attention, q, k, v, attention_mask, dropout=dropout, **structure.options, **kwargs)
    return out.flatten(2), weights


# --- layers ---
@_on_structure
def layer_forward(self: nn.Module, structure: Layer, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer whose sums are taken with the norms that follow them."""
    if args:
        own: Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
        return own
    checkpointing = self.__dict__.get(CHECKPOINTING)
    if checkpointing is not None and self.training and torch.is_grad_enabled():
        recomputed: Tensor = checkpointing.run(self, structure, hidden_states, kwargs)
        return recomputed
    return plain_layer(self, structure, hidden_states, **kwargs)


def plain_layer(layer: nn.Module, structure: Layer, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The layer as autograd keeps it, or as a decoding engine's pass runs it."""
    x = layer.input_layernorm(hidden_states)  # type: ignore[operator]
    x, _ = layer.self_attn(hidden_states=x, **kwargs)  # type: ignore[operator]
    now = current_pass()
    needed = None if now is None else now.needed_of(layer.self_attn)
    if needed is not None:  # the keys and values of all tokens are kept by now
        x, residual = x[:, needed], hidden_states[:, needed]
        return torch.zeros_like(hidden_states).index_copy_(1, needed, _after(layer, structure, residual, x, True))
    return _after(layer, structure, hidden_states, x, now is not None)


def _after(layer: nn.Module, structure: Layer, hidden_states: Tensor, x: Tensor, decodes: bool) -> Tensor:
    """The layer from attention's output on."""
    x, total = after_attention(layer, structure, hidden_states, x)
    mlp: Any = layer.mlp
    shape = mlp.__dict__.get(STRUCTURE)
    if decodes and not structure.after and isinstance(shape, MLP) and not has_hooks(mlp):
        hidden, down = mlp_hidden(mlp, shape, x), mlp.down_proj
        added = add_product(total, hidden, product_of(down)) if hidden.dtype == total.dtype else None
        return total + down(hidden) if added is None else added
    return total + after_mlp(layer, structure, mlp(x))


def after_attention(layer: nn.Module, structure: Layer, hidden_states: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """From attention's output to the MLP's input, and the residual stream."""
    if structure.after:
        x = getattr(layer, structure.after[0])(x)
    return add_norm(getattr(layer, structure.before_mlp), x, hidden_states)


def after_mlp(layer: nn.Module, structure: Layer, x: Tensor) -> Tensor:
    """What the MLP's output goes through before it is added."""
    return getattr(layer, structure.after[1])(x) if structure.after else x  # type: ignore[no-any-return]
