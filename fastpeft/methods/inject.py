"""From a LoraConfig to adapted layers: which modules a configuration means, and putting the adapters in.

Two steps, so that a mistake never leaves a model half changed. ``plan_adapter`` reads model and configuration, resolves
every name, and raises with near names when something does not fit. ``inject_adapter`` carries a plan out and hands back
an ``ExitStack`` whose ``close()`` takes everything out again.

The rules by which names match (whole name or last parts for a list, full match for a regular expression, first number
in a name as its layer) are PEFT's, because a configuration file must mean the same layers in both libraries. Where PEFT
passes over a name that matches nothing, a plan for a new adapter refuses it: the run would train less than was asked.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods.config import LoraConfig
from fastpeft.methods.modules_to_save import ModulesToSaveWrapper
from fastpeft.nn import LoRALinear, NF4Linear

# What PEFT adapts in a model family when target_modules is not given.
_DEFAULT_TARGETS = {
    ("q_proj", "v_proj"): (
        *("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm"),
        *("opt", "gptj", "gpt_neo", "bart"),
    ),
    ("q_proj", "v_proj", "fc1", "fc2"): ("phi",),
    ("query_key_value",): ("gpt_neox", "bloom"),
    ("query", "value"): ("bert", "roberta", "xlm-roberta", "electra"),
    ("q", "v"): ("t5", "mt5"),
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter will change in one model.

    Args:
        config: the configuration with ``target_modules`` resolved to what the adapter's file should say.
        targets: full names of the linear layers to adapt.
        modules_to_save: full names of the modules to copy whole.
    """

    config: LoraConfig
    targets: tuple[str, ...]
    modules_to_save: tuple[str, ...]


def plan_adapter(model: nn.Module, config: LoraConfig, every_name: bool = True) -> AdapterPlan:
    """Resolve a configuration against a model without changing either.

    Args:
        model: the base model, plain or already holding adapters; its weights are not looked at and may be on the meta
            device.
        config: what to adapt.
        every_name: refuse names that match nothing while others match. Off for adapters read from files, where the
            file's tensors say what belongs to it.
    Returns:
        The plan.
    Raises:
        UserError: nothing matches, a name matches nothing, or something matched cannot be adapted.
    """
    modules = dict(outer_modules(model))
    config = dataclasses.replace(config, target_modules=_resolve_targets(model, modules, config))
    named = [name for name in modules if _matches(config.target_modules, name)]
    saved = _plan_modules_to_save(modules, config)
    kept = [
        name
        for name in named
        if not _matches(config.exclude_modules, name)
        and not any(name == module or name.startswith(f"{module}.") for module in saved)
    ]
    targets = [name for name in kept if _in_layers(config, name)]
    if every_name:
        _check_names_are_used(config, modules, named, kept)
    if not targets:
        raise UserError(_nothing_matches(config, modules, named, kept))
    for name in targets:
        _check_target(name, modules[name])
    return AdapterPlan(config, tuple(targets), tuple(saved))


def inject_adapter(model: nn.Module, plan: AdapterPlan, adapter_name: str) -> ExitStack:
    """Put an adapter into a model; its parameters come trainable, and the layers it wraps frozen.

    Args:
        model: the model that the plan was made for.
        plan: what to do.
        adapter_name: a name that no adapter of the model has.
    Returns:
        A stack whose ``close()`` removes the adapter and gives every parameter its ``requires_grad`` back.
    Raises:
        UserError: weights of the model are not loaded. Whatever is raised, the model is left as it was.
    """
    for name in (*plan.targets, *plan.modules_to_save):
        if any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            raise UserError(
                f"the weight of '{name}' is on the meta device (not loaded, or offloaded); load the "
                "model whole before adding an adapter"
            )
    undo = ExitStack()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    undo.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags])
    config = plan.config
    try:
        for name in plan.targets:
            module = model.get_submodule(name)
            r, alpha = config.rank_of(name), config.alpha_of(name)
            options = (r, alpha, config.lora_dropout, config.use_rslora, config.init_lora_weights)
            if isinstance(module, LoRALinear):
                module.add_adapter(adapter_name, *options)
                undo.callback(module.delete_adapter, adapter_name)
            else:
                replace_module(model, name, LoRALinear(module, adapter_name, *options))
                undo.callback(replace_module, model, name, module)
        for name in plan.modules_to_save:
            module = model.get_submodule(name)
            if not isinstance(module, ModulesToSaveWrapper):
                undo.callback(replace_module, model, name, module)
                module = ModulesToSaveWrapper(module)
                replace_module(model, name, module)
            module.add_adapter(adapter_name)
            undo.callback(module.delete_adapter, adapter_name)
    except BaseException:
        undo.close()
        raise
    return undo


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk a model's modules, seeing an adapted layer or a wrapper as one module, without its inside.

    Args:
        model: any module; the root itself is left out.
    Yields:
        Full name and module.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, (LoRALinear, ModulesToSaveWrapper)):
            inside.append(f"{name}.")
        yield name, module


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the module ``name`` is.

    Args:
        model: the model that holds it.
        name: full name of the module to replace.
        new: what comes in its place.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _resolve_targets(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> list[str] | str:
    targets = config.target_modules
    if targets is None:
        family = str(getattr(getattr(model, "config", None), "model_type", ""))
        for usual, families in _DEFAULT_TARGETS.items():
            if family in families:
                return list(usual)
        raise UserError(
            f"target_modules is not given, and there is no usual choice for the model type '{family}'; use "
            f"'all-linear', or name some of this model's linear layers: {_some_linear_names(modules)}"
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = _output_embedding(model)
        linear = [name for name, module in modules.items() if _is_adaptable(module) and module is not head]
        foreign = [name for name, module in modules.items() if _is_foreign_linear(module) and module is not head]
        if foreign:
            _check_target(foreign[0], modules[foreign[0]])
        if not linear:
            raise UserError(f"target_modules='all-linear': {type(model).__name__} holds no linear layer to adapt")
        names = _shortest_names(linear, modules)
        # A full name would be adapted in any layer (see _in_layers); "all" is meant within the layers asked for.
        return [name for name in names if name not in modules or _in_layers(config, name)]
    return targets


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _shortest_names(chosen: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Name ``chosen`` by last parts ("q_proj") wherever that means no module outside ``chosen``."""
    wanted = set(chosen)
    names: list[str] = []
    for leaf in dict.fromkeys(name.rpartition(".")[2] for name in chosen):
        meant = [name for name in modules if _ends_with(name, leaf)]
        names += [leaf] if wanted.issuperset(meant) else [name for name in meant if name in wanted]
    return names


def _plan_modules_to_save(modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    planned: list[str] = []
    for entry in config.modules_to_save or []:
        names = [name for name in modules if _ends_with(name, entry)]
        if not names:
            raise UserError(f"modules_to_save: '{entry}' matches no module of the model; {_near(entry, modules)}")
        for name in names:
            _check_module_to_save(name, modules[name])
        planned += [name for name in names if name not in planned]
    return planned


def _check_module_to_save(name: str, module: nn.Module) -> None:
    if isinstance(module, ModulesToSaveWrapper):
        return
    if isinstance(module, _CONTAINERS):
        raise UserError(
            f"modules_to_save: '{name}' is a {type(module).__name__}, which is never called itself; name the modules "
            "in it"
        )
    for part in module.modules():
        if isinstance(part, (LoRALinear, ModulesToSaveWrapper)):
            raise UserError(f"modules_to_save: '{name}' already holds an adapter; a copy of it cannot be trained whole")
        if isinstance(part, NF4Linear):
            raise UserError(
                f"modules_to_save: '{name}' is quantised to NF4, and packed weights cannot be trained; keep it dense "
                f"with quantize(model, skip=['{name.rpartition('.')[2]}'])"
            )


def _check_target(name: str, module: nn.Module) -> None:
    if not _is_adaptable(module):
        inner = [child for child, part in module.named_modules() if child and _is_adaptable(part)]
        if _is_foreign_linear(module):
            advice = (
                "it has a forward pass or packed weights of its own; load the model dense and call "
                "fastpeft.quantize(model), or name other layers in target_modules"
            )
        elif inner:
            advice = f"name the linear layers in it: {', '.join(inner[:6])}"
        else:
            advice = "this version adapts torch.nn.Linear and NF4Linear; leave it out of target_modules"
        raise UserError(f"target_modules: '{name}' is a {type(module).__name__}, which cannot be adapted; {advice}")


def _check_names_are_used(
    config: LoraConfig, modules: dict[str, nn.Module], named: Sequence[str], kept: Sequence[str]
) -> None:
    linear = [name for name, module in modules.items() if _is_adaptable(module)]
    if isinstance(config.target_modules, list) and named:
        for entry in config.target_modules:
            if not any(_ends_with(name, entry) for name in named):
                raise UserError(f"target_modules: '{entry}' matches no module of the model; {_near(entry, linear)}")
    excluded = config.exclude_modules
    for entry in [excluded] if isinstance(excluded, str) else excluded or []:
        if not any(_matches(excluded if isinstance(excluded, str) else [entry], name) for name in modules):
            raise UserError(f"exclude_modules: '{entry}' matches no module of the model; {_near(entry, linear)}")
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if kept and not any(re.match(rf"(.*\.)?({pattern})$", name) for name in kept):
                raise UserError(f"{option}: '{pattern}' matches none of the adapted layers; {_near(pattern, kept)}")
    layers = config.layers_to_transform
    if layers is not None and kept:
        found = {index for name in kept if (index := _layer_index(config, name)) is not None}
        if not found:
            raise UserError(
                f"layers_to_transform={layers}: no target lies in a numbered layer"
                + (f" of {config.layers_pattern!r}; check layers_pattern" if config.layers_pattern else "")
            )
        absent = sorted(set(layers if isinstance(layers, list) else [layers]) - found)
        if absent:
            raise UserError(
                f"layers_to_transform: no target in layer {', '.join(map(str, absent))}; the model's layers with "
                f"targets are {min(found)} to {max(found)}"
            )


def _nothing_matches(
    config: LoraConfig, modules: dict[str, nn.Module], named: Sequence[str], kept: Sequence[str]
) -> str:
    if kept:
        return f"layers_to_transform={config.layers_to_transform}: no target_modules in these layers"
    if named:
        return (
            f"target_modules={config.target_modules!r}: all {len(named)} matching modules are left out by "
            "exclude_modules or modules_to_save"
        )
    linear = [name for name, module in modules.items() if _is_adaptable(module)]
    if isinstance(config.target_modules, str):
        advice = (
            f"a string must match whole names as a regular expression; linear layers: {_some_linear_names(modules)}"
        )
    else:
        advice = _near((config.target_modules or [""])[0], linear)
    return f"target_modules={config.target_modules!r} matches no module of the model; {advice}"


def _matches(patterns: list[str] | str | None, name: str) -> bool:
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(_ends_with(name, entry) for entry in patterns)


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _in_layers(config: LoraConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or (isinstance(config.target_modules, list) and name in config.target_modules):
        return True  # a layer named in full is meant, whatever its number: PEFT's rule
    return _layer_index(config, name) in (layers if isinstance(layers, list) else [layers])


def _layer_index(config: LoraConfig, name: str) -> int | None:
    patterns = config.layers_pattern
    if not patterns:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
    found = (re.match(expression, name) for expression in expressions)
    return next((int(match[1]) for match in found if match), None)


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear) or LoRALinear.can_adapt(module)


def _is_foreign_linear(module: nn.Module) -> bool:
    """A linear layer of another library, such as bitsandbytes' Linear4bit."""
    unused = nn.modules.linear.NonDynamicallyQuantizableLinear  # inside attention, where it is never called
    return isinstance(module, nn.Linear) and not isinstance(module, unused) and not _is_adaptable(module)


def _near(entry: str, names: Iterable[str]) -> str:
    """Say which names look like ``entry``, comparing with whole names and with their last parts."""
    names = list(names)
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(entry, leaves, n=3) or difflib.get_close_matches(entry, names, n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"the names end in: {', '.join(leaves[:12])}"


def _some_linear_names(modules: dict[str, nn.Module]) -> str:
    leaves = dict.fromkeys(name.rpartition(".")[2] for name, module in modules.items() if _is_adaptable(module))
    return ", ".join(list(leaves)[:12]) or "none"
