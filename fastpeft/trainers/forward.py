"""One pass of a model over a batch, up to its output layer, with the adapter that a role asks for.

The model is called as a whole, with whatever wraps it (adapters, soft prompts, DDP); only its output layer is taken out
for the call. So the logits of all tokens never exist, and the head's product runs where it is wanted (`heads`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods import PeftModel
from fastpeft.methods.virtual import Layout
from fastpeft.nn import Adapted

SCORE = "score"  # the name of a score layer, as in transformers' models for sequence classification


class _Keep(nn.Module):
    """Stands in for an output layer: it keeps the hidden states, and gives a sliver of them where logits go."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Keep what the output layer would read."""
        self.hidden = hidden
        return hidden[..., :1]


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside of the wrappers of DDP and adapters."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Run a model without its output layer.

    Args:
        model: a causal language model, or one for sequence classification, in whatever wraps it.
        inputs: arguments of its forward, ``input_ids`` ``(b, t)`` among them.
    Returns:
        ``(b, t, k)``, what the output layer would have read, without what belongs to an adapter's virtual tokens.
    """
    base = base_of(model)
    name = head_name(base)
    head, keep = getattr(base, name), _Keep()
    base._modules[name] = keep
    try:
        model(**inputs, use_cache=False)
    finally:
        base._modules[name] = head
    if keep.hidden is None:
        raise UserError(f"{type(base).__name__} did not call its output layer {name!r}; it cannot be trained here")
    length = inputs["input_ids"].shape[1]
    extra = keep.hidden.shape[1] - length
    if not extra:
        return keep.hidden
    # Where the model takes no logits_to_keep, or packed rows differ in it, virtual tokens are taken from logits alone.
    layout = Layout.grown(extra, length, inputs.get("attention_mask"), inputs.get("position_ids"))
    return layout.take(keep.hidden)


def head_name(base: nn.Module) -> str:
    """The name of a model's output layer, or of its score layer where it has none."""
    get = getattr(base, "get_output_embeddings", None)
    head = get() if callable(get) else None
    name = next((name for name, child in base.named_children() if child is head), None) if head is not None else None
    if name is not None:
        return name
    if SCORE in base._modules:
        return SCORE
    raise UserError(f"{type(base).__name__} has neither an output layer nor a layer named {SCORE!r}")


def batch_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Hidden states ``(b * t, k)`` of a batch of `PreferenceCollator`, in whichever layout."""
    names = ("input_ids", "attention_mask", "position_ids")
    arguments = {name: batch[name] for name in names if name in batch}
    mask = arguments.get("attention_mask")
    if mask is not None and mask.dim() == 4 and _attention_function(model) != "sdpa":  # it is added to the scores
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        arguments["attention_mask"] = blocked.masked_fill(~mask, torch.finfo(dtype).min)
    return hidden_states(model, **arguments).flatten(0, 1)


def token_count(inputs: Mapping[str, Tensor]) -> Tensor | int:
    """Tokens of a batch without its padding."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs["input_ids"].numel()
    return mask.sum() if mask.dim() == 2 else mask[:, 0, :, 0].sum()  # all but padding attends to the first token


def _attention_function(model: nn.Module) -> str:
    """The name transformers has for a model's attention function."""
    return str(getattr(getattr(base_of(model), "config", None), "_attn_implementation", None) or "eager")


def attention_of(model: nn.Module) -> str:
    """What a model's attention can be told: ``"masked"`` any mask, ``"packed"`` where rows end, ``"plain"`` neither."""
    config: Any = getattr(base_of(model), "config", None)
    implementation = _attention_function(model)
    if "flash" in implementation:
        return "packed"
    windowed = getattr(config, "sliding_window", None) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    return "masked" if implementation in ("sdpa", "eager") and not windowed else "plain"


@contextmanager
def role(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run a model with one adapter, or with none, and go back to what was active.

    An adapter that becomes active can train, and the others cannot: what is computed inside has to go backward inside.

    Args:
        model: a PeftModel, in whatever wraps it, or a model without adapters, which stays as it is.
        adapter: the adapter's name; None for the base alone.
    """
    inner = getattr(model, "module", model)
    if not isinstance(inner, PeftModel):
        yield
    elif adapter is None:
        with inner.disable_adapter():
            yield
    elif inner.active_adapters == [adapter]:
        yield
    else:
        before, configs = list(inner.active_adapters), inner.peft_config
        frozen = all(configs[name].inference_mode for name in before)
        inner.set_adapter(adapter, inference_mode=configs[adapter].inference_mode)
        try:
            yield
        finally:
            inner.set_adapter(before, inference_mode=frozen)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: two forward passes over the same tokens have to agree."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, Adapted):
            module.set_dropout(0.0)
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
