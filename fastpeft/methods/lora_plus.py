"""LoRA+: other learning rates for B than for A."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods.config_base import is_number


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: LoRA's B at ``ratio`` times the rate of everything else that trains.

    ``SFTTrainer(model, ..., optimizers=(fastpeft.optim.AdamW(lora_plus_groups(model, 1e-4, 16)), None))``

    Args:
        model: with LoRA adapters.
        lr: rate of A, and of what is no LoRA.
        ratio: of B's rate to A's; the paper takes 16.
        weight_decay: of all groups; vectors and biases have none.
        embedding_lr: rate of LoRA on embeddings.
    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``; empty ones are left out.
    Raises:
        UserError: a rate is out of range, or the model has no trainable LoRA.
    Source:
        LoRA+, arXiv 2402.12354.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr)):
        if not is_number(value) or not value > 0:
            raise UserError(f"lora_plus_groups: {name}={value!r}; must be a number above 0")
    rates = {"a": lr, "b": lr * ratio, "embedding": embedding_lr}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "embedding" if ".lora_embedding_" in name else "b" if ".lora_B." in name else "a"
            groups.setdefault((kind, parameter.dim() > 1), []).append(parameter)
    if not any(kind == "b" for kind, _ in groups):
        raise UserError("lora_plus_groups: the model has no LoRA that trains; add one with get_peft_model")
    return [
        {"params": params, "lr": rates[kind], "weight_decay": weight_decay if decays else 0.0}
        for (kind, decays), params in groups.items()
    ]
