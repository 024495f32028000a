"""What a trainer reads off a causal language model besides its loss: log-probabilities, and a score.

Log-probabilities come from hidden states (`forward`) by `fastpeft.ops.linear_logprobs`, a chunk of tokens at a time.

A score is a linear layer named ``score`` beside the output layer, as in transformers' models for sequence
classification, so that adapters save it as one of their ``modules_to_save`` and stock PEFT loads it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, get_peft_model
from fastpeft.nn import LoRALinear
from fastpeft.ops import linear_logprobs
from fastpeft.trainers.forward import SCORE, base_of, head_name, hidden_states
from fastpeft.trainers.losses import entropy as entropy_of

_CHUNK_BYTES = 64 << 20  # of float32 logits, where the head is no plain linear layer


class LogprobHead:
    """The output layer of a model: log-probabilities of tokens from hidden states.

    Args:
        model: a causal language model, in whatever wraps it.
        name: of the trainer, for messages.
    Raises:
        UserError: the model gets from hidden states to logits in a way that is not known here.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._base = base_of(model)
        get = getattr(self._base, "get_output_embeddings", None)
        if not callable(get) or get() is None:
            raise UserError(f"{name}: {type(self._base).__name__} has no output layer; give a causal language model")
        self._name = head_name(self._base)
        config: Any = getattr(self._base, "config", None)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self._confirm(name)

    @torch.no_grad()
    def _confirm(self, name: str) -> None:
        """Compare with the model's own logits, on a few tokens."""
        base, was_training = self._base, self._base.training
        base.eval()
        try:
            ids = torch.arange(4, device=next(base.parameters()).device)[None]
            logits = base(input_ids=ids, use_cache=False).logits.float()
            ours = self._logits(hidden_states(base, input_ids=ids))
        finally:
            base.train(was_training)
        if not (logits - ours).abs().max() <= 0.02 * logits.abs().max():
            raise UserError(
                f"{name}: {type(base).__name__} computes its logits in a way that is not known here (not a linear "
                "layer with a scale and a cap), so its log-probabilities would be wrong"
            )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = getattr(self._base, self._name)(hidden).float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return self._scale * logits

    @overload
    def __call__(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, *, entropy: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def __call__(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, *, entropy: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, *, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probability of each target.

        Args:
            hidden: ``(n, k)``.
            targets: ``(n,)``, int64.
            temperature: divides the logits.
            entropy: give also the entropy of each distribution, without gradient.
        Returns:
            ``(n,)`` float32, or a pair of them.
        """
        head = getattr(self._base, self._name)
        if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
            return linear_logprobs(  # type: ignore[call-overload,no-any-return]
                hidden.to(head.weight.dtype),
                head.weight,
                targets,
                head.bias,
                softcap=self._softcap,
                temperature=temperature / self._scale,
                entropy=entropy,
            )
        vocabulary = vocabulary_of(head)
        rows = max(1, _CHUNK_BYTES // (4 * vocabulary))
        parts = []
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            parts.append(checkpoint(self._chunk, part, target, temperature, use_reentrant=False))
        logprobs, entropies = (torch.cat(x) for x in zip(*parts, strict=True))
        return (logprobs, entropies) if entropy else logprobs

    def _chunk(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden) / temperature
        with torch.no_grad():
            entropies = entropy_of(logits)
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], entropies


def vocabulary_of(head: nn.Module) -> int:
    """Outputs of an output layer."""
    return int(getattr(head, "out_features", 0) or head.weight.shape[0])  # type: ignore[union-attr,index]


# --- scores ---


def attach_score(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model a layer named ``score``, ``(k) -> 1`` in float32, if it has none; in place.

    A model that already has adapters gets it frozen, for adapters to copy that come after (``modules_to_save``). Put
    adapters on "all-linear" before it, or they take the score for one of the layers to adapt.

    Args:
        model: a causal language model, with adapters or without, or one for sequence classification with one label.
        seed: of the first weights, normal with variance ``1 / (k + 1)``.
    Returns:
        The model.
    Raises:
        UserError: its score layer has several outputs, or an adapter of its own.
    Source:
        Learning to summarize from human feedback, arXiv 2009.01325, appendix B.1.
    """
    base = base_of(model)
    present = base._modules.get(SCORE)
    if isinstance(present, LoRALinear):
        raise UserError(
            "the adapter on 'all-linear' took the layer 'score' for one to adapt; attach the score after get_peft_model"
        )
    if present is not None:
        outputs = int(present.weight.shape[0])  # type: ignore[index,union-attr]
        if outputs != 1:
            raise UserError(f"{type(base).__name__}: its layer 'score' has {outputs} outputs; it needs 1")
        return model
    embedding = base.get_input_embeddings().weight  # type: ignore[operator]
    config: Any = base.config
    width = int(config.get_text_config().hidden_size)
    layer = nn.Linear(width, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        values = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)
        layer.weight.copy_(values)
    base.add_module(SCORE, layer.to(embedding.device).requires_grad_(base is model))
    return model


def with_score(config: LoraConfig) -> LoraConfig:
    """An adapter's configuration with its own copy of the score layer."""
    saved = list(config.modules_to_save or [])
    return config if SCORE in saved else dataclasses.replace(config, modules_to_save=[*saved, SCORE])


def get_reward_model(model: nn.Module, peft_config: LoraConfig | None = None, seed: int = 0) -> nn.Module:
    """Make a reward model of a causal language model: a score layer, and an adapter that trains with it.

    Args:
        model: the language model, dense or quantised; changed in place.
        peft_config: the adapter; None trains every weight.
        seed: of the score layer's first weights.
    Returns:
        The model, wrapped if there is an adapter. ``save_pretrained`` writes the score with the adapter or the model.
    """
    attach_score(model, seed)
    return model if peft_config is None else get_peft_model(model, with_score(peft_config))


def has_score(model: nn.Module) -> bool:
    """Whether a model has a score layer that its active adapter trains, or that trains with the whole model."""
    layer = base_of(model)._modules.get(SCORE)
    return layer is not None and any(p.requires_grad for p in layer.parameters())


def scores_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """The scores ``(...)`` in float32 of hidden states ``(..., k)``, by the active adapter's score layer."""
    layer: Any = getattr(base_of(model), SCORE)
    with torch.autocast(hidden.device.type, enabled=False):
        weight: Tensor = layer.weight
        return layer(hidden.to(weight.dtype))[..., 0].float()  # type: ignore[no-any-return]
