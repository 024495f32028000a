"""The loss of a causal language model without its logits.

A model that is given labels in training answers with the loss; its logits, eight times the size of everything else at a
vocabulary of 128,256, are needed by nobody. Output layer and cross-entropy then run as one op over the hidden states
(`fastpeft.ops.linear_cross_entropy`), and ``logits`` in the answer is None. In evaluation, and wherever ``logits`` may
be read, the class's own forward runs; ``skip_logits=True`` or ``False`` decides otherwise. ``count_correct=True`` asks
how many targets have the greatest logit, which costs a further product over the vocabulary.

A mixture that is asked for its router's logits adds a loss of them: then the class's own forward runs too.

An output layer with adapters is no product that the op knows. Its logits are then made by the layer itself, a chunk of
tokens at a time, and made again in backward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)

from fastpeft.models.fused import STRUCTURE
from fastpeft.models.structure import Random, Unknown, difference, probing, shallow_copy, tolerance
from fastpeft.nn import Adapted
from fastpeft.ops import linear_cross_entropy

_IGNORE_INDEX = -100
_CHUNK_BYTES = 256 << 20  # of logits at a time


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """The answer with a loss and without logits.

    Attributes:
        correct: how many targets have the greatest logit, ``()`` int64, where it was asked for.
    """

    correct: Tensor | None = None


@dataclass(frozen=True)
class CausalLM:
    """A base model, an output layer, and a loss over shifted labels.

    Attributes:
        base: name of the base model.
        head: name of the output layer.
        softcap: bound of the logits, ``softcap * tanh(logits / softcap)``.
        logit_scale: factor of the logits.
    """

    base: str
    head: str
    softcap: float | None
    logit_scale: float


def looks_like_causal_lm(module: nn.Module) -> bool:
    """Whether a module has a base model, an output layer, and a loss."""
    prefix = getattr(module, "base_model_prefix", None)
    return (
        bool(prefix)
        and isinstance(getattr(module, str(prefix), None), nn.Module)
        and hasattr(type(module), "loss_function")
        and _head_name(module) is not None
    )


def read_causal_lm(module: nn.Module) -> CausalLM:
    """Find how a model gets from hidden states to its loss.

    Raises:
        Unknown: its loss is another one, or its logits are computed in another way.
    """
    head = _head_name(module)
    assert head is not None
    if getattr(module, "loss_function", None) is not ForCausalLMLoss:
        raise Unknown("its loss is not the one of causal language models")
    layer = getattr(module, head)
    if not _is_usable(layer):
        raise Unknown(f"its {head} is a {type(layer).__name__}, not a plain linear layer")
    config: Any = module.config
    structure = CausalLM(
        str(module.base_model_prefix),
        head,
        getattr(config, "final_logit_softcapping", None),
        getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1),
    )
    _confirm(module, structure)
    return structure


def _head_name(module: nn.Module) -> str | None:
    get = getattr(module, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, child in module.named_children() if child is head), None)


def _is_plain(head: nn.Module) -> bool:
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in head.__dict__
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


def _is_usable(head: nn.Module) -> bool:
    """Whether the loss can be computed by this output layer without holding all logits."""
    return _is_plain(head) or (isinstance(head, Adapted) and head.routing is None)


class _Hidden(nn.Module):
    """Stands in for a base model whose hidden states are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        """Give the hidden states; mixtures ask for their router's logits, others do not look."""
        return MoeModelOutputWithPast(last_hidden_state=self._hidden)  # type: ignore[arg-type]


def _confirm(module: nn.Module, structure: CausalLM) -> None:
    weight: Tensor = getattr(module, structure.head).weight
    hidden = Random(weight)(2, 6, weight.shape[1])
    ids = torch.arange(12, device=weight.device).view(2, 6) % weight.shape[0]
    ids[0, :2] = _IGNORE_INDEX
    probed = shallow_copy(module)
    probed._modules[structure.base] = _Hidden(hidden)
    for extra in ({}, {"num_items_in_batch": 5}):
        with probing(probed):
            own = probed(input_ids=ids.clamp(min=0), labels=ids, **extra)
            if type(own) not in (CausalLMOutputWithPast, MoeCausalLMOutputWithPast) or own.loss is None:
                raise Unknown(f"it answers with a {type(own).__name__}")
            loss = _loss(structure, getattr(module, structure.head), hidden, _targets(ids, extra), extra)
        if not difference(loss.float(), own.loss.float()) <= tolerance(hidden):
            raise Unknown("its loss is computed in another way")


def _targets(labels: Tensor | None, extra: dict[str, Any]) -> Tensor:
    """For each place the token after it, as transformers shifts them."""
    targets = extra.get("shift_labels")
    if targets is None:
        assert labels is not None
        targets = F.pad(labels[..., 1:], (0, 1), value=extra.get("ignore_index", _IGNORE_INDEX))
    return targets.flatten()


def _loss(structure: CausalLM, head: Any, hidden: Tensor, targets: Tensor, extra: dict[str, Any]) -> Tensor:
    """The loss as transformers defines it: a mean over targets, or their sum over ``num_items_in_batch``."""
    if not _is_plain(head):
        return _loss_in_chunks(structure, head, hidden.flatten(0, -2), targets.to(hidden.device), extra)
    return linear_cross_entropy(
        hidden.flatten(0, -2),
        head.weight,
        targets.to(hidden.device),
        head.bias,
        ignore_index=extra.get("ignore_index", _IGNORE_INDEX),
        num_items=extra.get("num_items_in_batch"),
        softcap=structure.softcap,
        logit_scale=structure.logit_scale,
    )


def _loss_in_chunks(structure: CausalLM, head: Any, hidden: Tensor, targets: Tensor, extra: dict[str, Any]) -> Tensor:
    """The same by an output layer of any kind; no more than a chunk of logits is ever held."""
    ignored = extra.get("ignore_index", _IGNORE_INDEX)

    def summed(part: Tensor, target: Tensor) -> Tensor:
        logits = head(part).float() * structure.logit_scale
        if structure.softcap is not None:
            logits = structure.softcap * torch.tanh(logits / structure.softcap)
        return F.cross_entropy(logits, target, ignore_index=ignored, reduction="sum")

    rows = max(1, _CHUNK_BYTES // (4 * head.out_features))
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    total = torch.stack([checkpoint(summed, part, target, use_reentrant=False) for part, target in chunks]).sum()
    count = extra.get("num_items_in_batch")
    if count is None:
        count = targets.ne(ignored).sum()
    loss: Tensor = total / (count.to(total.device) if isinstance(count, Tensor) else count)
    return loss


@torch.no_grad()
def _count_correct(head: Any, hidden: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """How many targets have the greatest logit; caps and scales leave the order as it is."""
    hidden, targets = hidden.detach().flatten(0, -2), targets.to(hidden.device)
    rows = max(1, _CHUNK_BYTES // (head.weight.shape[0] * hidden.element_size()))
    correct = targets.new_zeros(())
    for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head(part)
        chosen = logits.gather(-1, target.clamp(min=0)[:, None])[:, 0]
        correct += ((chosen == logits.amax(-1)) & (target != ignore_index)).sum()
    return correct


def has_fused_loss(model: nn.Module) -> bool:
    """Whether a model, called with labels, can do without logits.

    Args:
        model: the causal language model itself, out of any wrapper.
    """
    structure = model.__dict__.get(STRUCTURE)
    return isinstance(structure, CausalLM) and _is_usable(getattr(model, structure.head))


def make_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """Write the forward of a causal language model around that of its class; it keeps the signature.

    Args:
        own: the class's forward.
    """
    signature = inspect.signature(own)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(own)
    def forward(
        self: nn.Module, *args: Any, skip_logits: bool | None = None, count_correct: bool = False, **kwargs: Any
    ) -> Any:
        structure: Any = self.__dict__.get(STRUCTURE)
        head = None if structure is None else getattr(self, structure.head)
        wanted = self.training if skip_logits is None else skip_logits
        if not wanted or head is None or not _is_usable(head) or kwargs.get("return_dict") is False:
            return own(self, *args, **kwargs)
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        extra = arguments.pop(rest, {})
        labels, keep = arguments.pop("labels", None), arguments.pop("logits_to_keep", 0)
        if labels is None and extra.get("shift_labels") is None:
            return own(self, *args, **kwargs)
        balances = arguments.get("output_router_logits")
        if balances or (balances is None and getattr(self.config, "output_router_logits", False)):
            return own(self, *args, **kwargs)
        del arguments["self"]
        arguments.setdefault("use_cache", False)  # nobody goes on generating from a loss
        extra.pop("return_dict", None)
        outputs = getattr(self, structure.base)(**arguments, **extra)
        hidden = outputs.last_hidden_state
        if not isinstance(keep, int):
            hidden = hidden[:, keep]
        elif keep:
            hidden = hidden[:, -keep:]
        targets = _targets(labels, extra)
        loss = _loss(structure, head, hidden, targets, extra)
        correct = None
        if count_correct:
            correct = _count_correct(head, hidden, targets, extra.get("ignore_index", _IGNORE_INDEX))
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return LossOutput(loss=loss, logits=None, correct=correct, **others)  # type: ignore[arg-type]

    return forward
