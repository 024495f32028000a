"""Model FLOPs utilisation (MFU): the arithmetic that a step cannot do without, over what the GPU could have done.

With two operations a multiply-add:

    a frozen weight (n, k)    4 n k a token: forward, and the gradient of the input
    a trained weight (n, k)   6 n k a token: the gradient of the weight too; adapters are such weights
    the output layer          as above, but a target and not a token, as nothing else needs its logits
    attention                 12 q a layer for each pair of a token and one that it sees; q: width of all query heads

What checkpointing computes again does not count, so a run that recomputes has a lower MFU at the same speed. Norms,
softmax, embeddings, virtual tokens and the optimizer are left out; windows of attention are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn import LoRAEmbedding, NF4Linear, PromptEncoder, SoftPrompt
from fastpeft.trainers.forward import base_of, head_name

# Dense bf16 operations a second with fp32 accumulation, from NVIDIA's data sheets. All words of an entry have to be in
# the device's name; the first entry that fits counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("A40", 149.7e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)
_OTHER_CHIPS = {"MIG", "Laptop", "D", "Ti"}  # of the same number, and slower or faster
_NO_PRODUCTS = (nn.Embedding, LoRAEmbedding, SoftPrompt, PromptEncoder)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class StepFlops:
    """Operations that training a model needs.

    Attributes:
        token: for each token of text, without the output layer and attention.
        target: for each token that has a loss.
        pair: for each token and each token that it sees, itself included.
    """

    token: int
    target: int
    pair: int

    def total(self, tokens: float, targets: float, pairs: float) -> float:
        """Operations of so many of each."""
        return self.token * tokens + self.target * targets + self.pair * pairs


def step_flops(model: nn.Module) -> StepFlops | None:
    """Count by the formulas above.

    Args:
        model: a causal language model, in whatever wraps it.
    Returns:
        The operations; None for a mixture of experts, and where the configuration lacks a size or there is no output
        layer.
    """
    base = base_of(model)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    if not layers or not heads or any(getattr(text, name, None) for name in _EXPERTS):
        return None
    try:
        head = {id(module) for module in base.get_submodule(head_name(base)).modules()}
    except UserError:
        return None
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    left_out = {
        id(inner) for module in model.modules() if isinstance(module, _NO_PRODUCTS) for inner in module.modules()
    }
    token = target = 0
    for module in model.modules():
        if id(module) in left_out:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() != 2:
                continue
            numbers = parameter.numel()
            if isinstance(module, NF4Linear) and name == "weight":  # two to a byte
                numbers = module.in_features * module.out_features
            flops = numbers * (6 if parameter.requires_grad else 4)
            if id(module) in head:
                target += flops
            else:
                token += flops
    return StepFlops(token, target, 12 * layers * heads * head_size)


def peak_flops(device_name: str) -> float | None:
    """What a GPU does at most, in dense bf16 operations a second.

    Args:
        device_name: as torch gives it: ``"NVIDIA H100 80GB HBM3"``.
    Returns:
        The data sheet's number; None for a GPU that is not in the table, and for a part of one.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    if words & _OTHER_CHIPS:
        return None
    return next((peak for name, peak in _PEAKS if set(name.split()) <= words), None)


def causal_pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Pairs of a token and one that it sees: l (l + 1) / 2 for a row of l tokens.

    Args:
        batch: with ``attention_mask`` ``(b, t)``, or with ``position_ids`` ``(b, t)`` that begin again with each row.
    Returns:
        Their number, int64, on the batch's device.
    """
    if "position_ids" in batch:
        return (batch["position_ids"] + 1).sum()
    lengths = batch["attention_mask"].sum(1)
    return (lengths * (lengths + 1) // 2).sum()


@dataclass(frozen=True)
class Utilisation:
    """MFU of a run.

    Attributes:
        flops: of the model.
        peak: operations a second of all devices together.
    """

    flops: StepFlops
    peak: float

    @classmethod
    def of(cls, model: nn.Module, device_name: str | None, devices: int = 1) -> Utilisation | None:
        """None where the device or the model is not known.

        Args:
            model: what trains.
            device_name: of each device; None for one that is no GPU.
            devices: how many.
        """
        peak = None if device_name is None else peak_flops(device_name)
        flops = None if peak is None else step_flops(model)
        return None if peak is None or flops is None else cls(flops, peak * devices)

    def share(self, tokens: float, targets: float, pairs: float, seconds: float) -> float:
        """MFU, from 0 to 1, of a time in which so much was trained."""
        return self.flops.total(tokens, targets, pairs) / (seconds * self.peak)
