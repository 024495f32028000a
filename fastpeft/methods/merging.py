"""Folding adapters into a model's weights, for a while or for good."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods.bottleneck import ATTENTION_SITE, OUTPUT_SITE, remove_site
from fastpeft.methods.modules_to_save import ModulesToSaveWrapper
from fastpeft.methods.targets import outer_modules, replace_module
from fastpeft.nn import AdaptedLinear, BottleneckSite, LoRAEmbedding, LoRAExperts, NF4Experts, NF4Linear, Prompts
from fastpeft.ops import NF4Weight, nf4_dequantize, nf4_quantize

logger = logging.getLogger(__name__)

Mergeable = (AdaptedLinear, LoRAEmbedding, LoRAExperts)


def mergeable(base: nn.Module) -> list[tuple[str, AdaptedLinear | LoRAEmbedding | LoRAExperts]]:
    """Layers of a base model whose adapters can become part of a weight; of nested ones the outer."""
    return [(name, module) for name, module in outer_modules(base) if isinstance(module, Mergeable)]


def check_finite(base: nn.Module, names: Sequence[str]) -> None:
    """Refuse merged weights that hold NaN or Inf.

    Raises:
        UserError: one does; nothing is changed.
    """
    for module_name, module in mergeable(base):
        if isinstance(module, LoRAExperts):
            weights = list(module.merged_dense_weights(names).values())
        else:
            weights = [module.merged_dense_weight(names)]
        if not all(weight.isfinite().all() for weight in weights):
            raise UserError(
                f"merge: the merged weight of '{module_name}' holds NaN or Inf; the adapter is broken or "
                f"overflows the layer's dtype. No layer was changed"
            )


def check_mergeable(wrapper: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters that no weight can express.

    Raises:
        UserError: a name is virtual tokens or bottleneck adapters.
    """
    for module in wrapper.modules():
        if isinstance(module, (Prompts, BottleneckSite)):
            for name in names:
                if name in module.held():
                    what = "virtual tokens" if isinstance(module, Prompts) else "bottleneck adapters with an activation"
                    raise UserError(
                        f"merge_and_unload: '{name}' is {what}, which no weight can express; save it as an adapter "
                        "(save_pretrained), or name others in adapter_names"
                    )


def strip(wrapper: nn.Module, base: nn.Module, names: Sequence[str], requantize: bool = False) -> nn.Module:
    """Put plain layers back, with the named adapters in them.

    Args:
        wrapper: a PeftModel.
        base: the model in it.
        names: adapters to fold in.
        requantize: make layers that were NF4 so again; the error that this adds is logged.
    Returns:
        The base model, frozen.
    """
    errors: dict[str, float] = {}
    wrapped = (*Mergeable, ModulesToSaveWrapper)
    for name in [name for name, module in outer_modules(base) if isinstance(module, wrapped)]:
        # By names only, so that each old weight can go.
        replace_module(base, name, _plain(base.get_submodule(name), names, requantize, name, errors))
    for layer in list(base.modules()):
        for place in (ATTENTION_SITE, OUTPUT_SITE):
            if isinstance(layer._modules.get(place), BottleneckSite):
                remove_site(layer, place)
    wrapper._modules.pop("prompt_encoder", None)
    base.requires_grad_(False)
    _note_untied_embeddings(base)
    if errors:
        worst = max(errors, key=errors.__getitem__)
        logger.warning(
            "merge_and_unload: quantising %d merged layers again changes their weights by %.2f%% on average (relative "
            "norm), at most %.2f%% in %s",
            len(errors),
            100 * sum(errors.values()) / len(errors),
            100 * errors[worst],
            worst,
        )
    return base


def _plain(module: nn.Module, names: Sequence[str], requantize: bool, name: str, errors: dict[str, float]) -> nn.Module:
    """What stands in an adapted module's place once the named adapters are part of the model."""
    if isinstance(module, Mergeable):
        base = module.innermost()
        if not module.holds_any(names):
            return base
        if requantize and isinstance(base, NF4Linear):
            dense = module.to_dense(names)
            quantised, errors[name] = _requantised(dense.weight, base.nf4)  # type: ignore[arg-type]
            return NF4Linear(quantised, dense.bias).train(module.training)  # type: ignore[arg-type]
        if requantize and isinstance(base, NF4Experts):
            dense, weights = module.to_dense(names), {}
            for part, nf4 in base.packed.items():
                weights[part], errors[f"{name}.{part}"] = _requantised(dense.get_parameter(part), nf4)
            return NF4Experts(dense, **weights)
        return module.to_dense(names)
    assert isinstance(module, ModulesToSaveWrapper)
    copies = [module.modules_to_save[name] for name in names if name in module.modules_to_save]
    return copies[0] if copies else module.original_module


def _requantised(weight: Tensor, base: NF4Weight) -> tuple[NF4Weight, float]:
    """A weight in the base's NF4, and the relative norm of what that changes."""
    packed = nf4_quantize(weight, base.block_size, base.double_quant)
    difference = nf4_dequantize(packed, torch.float32) - weight.float()
    return packed, float(difference.norm() / weight.float().norm().clamp_min(1e-30))


def _note_untied_embeddings(model: nn.Module) -> None:
    """Clear ``tie_word_embeddings`` where merging gave one of the embeddings a weight of its own."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and torch.is_tensor(head.weight) and head.weight is not embedding.weight:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
