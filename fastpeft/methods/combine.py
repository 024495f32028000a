"""Weighted combinations of adapters: sums, pruning by magnitude, TIES and DARE, on the factors or on whole updates.

Names and arithmetic are PEFT's, so that one call gives the same adapter in both libraries (DARE: on equal draws).

Source: TIES, arXiv 2306.01708; DARE, arXiv 2311.03099.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError, did_you_mean
from fastpeft.methods.config_base import is_number
from fastpeft.methods.ia3 import IA3Config
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.methods.saving import adapted_modules
from fastpeft.nn import IA3Linear, LoRAEmbedding, LoRALinear
from fastpeft.nn.lora_init import begins_in_base

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = ("svd", "linear", "cat", *_PRUNING, *(f"{kind}_svd" for kind in _PRUNING))


@dataclass(frozen=True)
class Options:
    """How adapters are combined; `fastpeft.PeftModel.add_weighted_adapter` says what the fields mean."""

    kind: str
    svd_rank: int | None
    density: float | None
    majority_sign_method: str

    @property
    def uses_svd(self) -> bool:
        """Whether whole updates are combined, and decomposed anew."""
        return self.kind.endswith("svd")


def plan(configs: Mapping[str, Any], weights: Sequence[float], options: Options) -> Any:
    """The configuration of a combination.

    Args:
        configs: of the adapters.
        weights: their factors.
        options: how to combine.
    Raises:
        UserError: the adapters cannot be combined so.
    """
    if options.kind not in KINDS:
        hint = did_you_mean(options.kind, KINDS)
        raise UserError(f"combination_type={options.kind!r}; must be one of {', '.join(map(repr, KINDS))}{hint}")
    if not configs or len(configs) != len(weights) or not all(map(is_number, weights)):
        raise UserError(
            f"add_weighted_adapter: {len(configs)} different adapters and {len(weights)} weights; give one number for "
            "each"
        )
    _check_pruning(options)
    kinds = {type(config) for config in configs.values()}
    first = next(iter(configs.values()))
    if kinds == {IA3Config} and options.kind == "linear":
        targets = [config.target_modules for config in configs.values()]
        feedforward = [config.feedforward_modules for config in configs.values()]
        return dataclasses.replace(first, target_modules=_union(targets), feedforward_modules=_union(feedforward))
    if kinds != {LoraConfig}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"add_weighted_adapter: {options.kind} combines LoRA adapters ('linear' (IA)^3 too), and these are {found}"
        )
    for name, config in configs.items():
        if (
            config.use_dora
            or config.target_parameters
            or config.modules_to_save
            or config.bias != "none"
            or begins_in_base(config.init_lora_weights)
        ):
            raise UserError(
                f"add_weighted_adapter: '{name}' has DoRA, target_parameters, modules_to_save, trained biases or "
                "starting factors, which a combination cannot express; merge it into the model instead"
            )
    rank = _rank(configs, options)
    return dataclasses.replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        init_lora_weights=True,
        loftq_config={},
        shared_a=False,
        target_modules=_union([config.target_modules for config in configs.values()]),
        rank_pattern={},
        alpha_pattern={},
    )


def fill(model: nn.Module, adapter_name: str, weights: Mapping[str, float], options: Options) -> None:
    """Compute the values of a combination.

    Args:
        model: a PeftModel that holds the new adapter.
        adapter_name: the new adapter.
        weights: factor by adapter.
        options: how to combine.
    """
    with torch.no_grad():
        for _, module in adapted_modules(model):
            if adapter_name not in module.held():
                continue
            here = {name: weight for name, weight in weights.items() if name in module.held()}
            if isinstance(module, IA3Linear):
                vectors = [module.ia3_l[name] for name in here]
                module.ia3_l[adapter_name].copy_(_sum(vectors, list(here.values())))
            elif isinstance(module, (LoRALinear, LoRAEmbedding)):
                _fill_lora(module, adapter_name, here, options)


def _fill_lora(
    module: LoRALinear | LoRAEmbedding, adapter_name: str, weights: dict[str, float], options: Options
) -> None:
    into = module.factors(adapter_name)
    factors = [module.factors(name) for name in weights]
    scaled = [weight * module.scaling[name] for name, weight in weights.items()]
    if options.kind == "cat":
        a = torch.cat([a * weight for (a, _), weight in zip(factors, scaled, strict=True)])
        b = torch.cat([b for _, b in factors], 1)
    elif options.uses_svd:
        updates = [module.scaling[name] * (b @ a) for name, (a, b) in zip(weights, factors, strict=True)]
        total = _combiner(options)(updates, list(weights.values()))
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        rank = into[0].shape[0]
        a, b = vh[:rank], u[:, :rank] * s[:rank]
    else:
        roots = [math.sqrt(abs(weight)) for weight in scaled]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
        combiner = _combiner(options)
        a = combiner([a for a, _ in factors], signed)
        b = combiner([b for _, b in factors], roots)
    for place, value in zip(into, (a, b), strict=True):
        place.zero_()
        rows, columns = value.shape
        place[:rows, :columns].copy_(value)


# --- arithmetic ---
def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def _combiner(options: Options) -> Callable[[Sequence[Tensor], Sequence[float]], Tensor]:
    kind, density = options.kind.removesuffix("_svd"), options.density or 0.0
    if kind == "dare_linear":
        return lambda tensors, weights: _sum([_drop(t, density) for t in tensors], weights)
    if kind == "magnitude_prune":
        return lambda tensors, weights: _sum([_keep_greatest(t, density) for t in tensors], weights)
    if kind in ("ties", "dare_ties"):
        prune = _keep_greatest if kind == "ties" else _drop
        return lambda tensors, weights: _elect([prune(t, density) for t in tensors], weights, options)
    return _sum


def _keep_greatest(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the greatest values."""
    kept = torch.zeros_like(tensor).flatten()
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def _drop(tensor: Tensor, density: float) -> Tensor:
    """Zero values at random, and scale the others so that the expectation stays."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _elect(tensors: Sequence[Tensor], weights: Sequence[float], options: Options) -> Tensor:
    """Mean of those values that have the sign of the majority."""
    stacked = torch.stack(list(tensors))
    votes = stacked if options.majority_sign_method == "total" else stacked.sign()
    elected = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    factors = torch.tensor(weights, device=stacked.device).view(-1, *(1,) * (stacked.dim() - 1))
    return (stacked * factors * elected).sum(0) / elected.sum(0).clamp(min=1)


# --- checks ---
def _check_pruning(options: Options) -> None:
    prunes = options.kind.removesuffix("_svd") in _PRUNING
    if prunes and not (is_number(options.density) and 0 < options.density < 1):  # type: ignore[operator]
        raise UserError(
            f"combination_type={options.kind!r}: density is {options.density}; it must be a number between 0 and 1, "
            "the share of values to keep"
        )
    if options.majority_sign_method not in ("total", "frequency"):
        raise UserError(
            f"majority_sign_method={options.majority_sign_method!r}; must be 'total' or 'frequency'"
            + did_you_mean(options.majority_sign_method, ("total", "frequency"))
        )


def _rank(configs: Mapping[str, LoraConfig], options: Options) -> int:
    ranks = [config.r for config in configs.values()]
    if options.kind == "cat" or options.uses_svd:
        highest = [max([config.r, *config.rank_pattern.values()]) for config in configs.values()]
        if options.kind == "cat":
            return sum(highest)
        rank = max(highest) if options.svd_rank is None else options.svd_rank
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UserError(f"svd_rank={rank!r}; must be a whole number of at least 1")
        return rank
    if len(set(ranks)) > 1 or any(config.rank_pattern for config in configs.values()):
        shown = ", ".join(f"{name} {config.r}" for name, config in configs.items())
        raise UserError(
            f"combination_type={options.kind!r} combines the factors one by one, for which all ranks must be equal; "
            f"they are {shown} (or have a rank_pattern). Use 'svd' or 'cat'"
        )
    return ranks[0]


def _union(targets: Sequence[list[str] | str | None]) -> list[str] | str:
    if len({type(target) for target in targets}) > 1:
        raise UserError("add_weighted_adapter: some adapters name their layers in a list and others in an expression")
    if isinstance(targets[0], str):
        return "|".join(f"({target})" for target in dict.fromkeys(map(str, targets)))
    return list(dict.fromkeys(entry for target in targets for entry in target or []))
