"""Which modules a configuration means, by PEFT's rules of names.

The rules (whole name or last parts for a list, full match for a regular expression, first number in a name as its
layer) are PEFT's, because a configuration file must mean the same layers in both libraries. Where PEFT passes over a
name that matches nothing, a plan for a new adapter refuses it: the run would train less than was asked.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods.modules_to_save import ModulesToSaveWrapper
from fastpeft.nn import Adapted, AdaptedLinear, LoRAExperts, NF4Module
from fastpeft.nn.base_weight import is_linear
from fastpeft.nn.experts import EXPERT_WEIGHTS
from fastpeft.nn.lora_experts import has_experts

_Wrapper = TypeVar("_Wrapper", bound=nn.Module)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter will change in one model.

    Args:
        config: the configuration with ``target_modules`` resolved to what the adapter's file should say.
        targets: full names of the modules to adapt.
        modules_to_save: full names of the modules to copy whole.
        parameters: full names of experts' weights to adapt.
        from_file: a file's values follow, so that none need be drawn or derived.
        holds_start: among them what a PiSSA or OLoRA adapter began with.
    """

    config: Any
    targets: tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    from_file: bool = False
    holds_start: bool = False


def plan_targets(
    model: nn.Module,
    config: Any,
    every_name: bool,
    defaults: Mapping[tuple[str, ...], tuple[str, ...]],
    can_adapt: Callable[[nn.Module], bool],
) -> AdapterPlan:
    """Resolve a configuration with ``target_modules`` against a model without changing either.

    Args:
        model: the base model, plain or already holding adapters; its weights are not looked at and may be on the meta
            device.
        config: a LoraConfig or an IA3Config.
        every_name: refuse names that match nothing while others match.
        defaults: targets of model families where the configuration names none.
        can_adapt: whether the method adapts a module that is named.
    Returns:
        The plan.
    Raises:
        UserError: nothing matches, a name matches nothing, or something matched cannot be adapted.
    """
    modules = dict(outer_modules(model))
    parameters = plan_parameters(modules, config, every_name)
    if parameters and config.target_modules == []:
        if every_name:
            _check_patterns(config, parameters)
        return AdapterPlan(config, (), tuple(plan_modules_to_save(modules, config)), parameters)
    config = dataclasses.replace(config, target_modules=_resolve_targets(model, modules, config, defaults))
    named = [name for name in modules if matches(config.target_modules, name)]
    saved = plan_modules_to_save(modules, config)
    kept = [
        name
        for name in named
        if not matches(config.exclude_modules, name)
        and not any(name == module or name.startswith(f"{module}.") for module in saved)
    ]
    targets = [name for name in kept if _in_layers(config, name)]
    if every_name:
        _check_names_are_used(model, config, modules, named, kept)
        _check_patterns(config, [*kept, *parameters])
    if not targets:
        raise UserError(_nothing_matches(model, config, modules, named, kept))
    for name in targets:
        _check_target(name, modules[name], can_adapt)
    return AdapterPlan(config, tuple(targets), tuple(saved), parameters)


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk a model's modules, seeing an adapted layer or a wrapper as one module, without its inside.

    Args:
        model: any module; the root itself is left out.
    Yields:
        Full name and module.
    """
    adapted = None  # the last one's name, with its dot: what is inside follows it directly
    for name, module in model.named_modules():
        if not name or (adapted is not None and name.startswith(adapted)):
            continue
        if isinstance(module, Adapted):
            adapted = f"{name}."
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


def wrap_module(model: nn.Module, name: str, kind: type[_Wrapper], undo: ExitStack) -> _Wrapper:
    """The wrapper of a kind around the module ``name``: the one that is there, or a new one in its place.

    Args:
        model: the model that holds it.
        name: full name.
        kind: the wrapper's class.
        undo: how to take a new one out again.
    """
    module = model.get_submodule(name)
    if isinstance(module, kind):
        return module
    undo.callback(replace_module, model, name, module)
    wrapper = kind(module)
    replace_module(model, name, wrapper)
    return wrapper


def _resolve_targets(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: Any,
    defaults: Mapping[tuple[str, ...], tuple[str, ...]],
) -> list[str] | str:
    targets = config.target_modules
    if targets is None:
        family = str(getattr(getattr(model, "config", None), "model_type", ""))
        for usual, families in defaults.items():
            if family in families:
                return list(usual)
        raise UserError(
            f"target_modules is not given, and there is no usual choice for the model type '{family}'; use "
            f"'all-linear', or name some of this model's linear layers: {_some_linear_names(modules)}"
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = _output_embedding(model)
        linear = [name for name, module in modules.items() if is_adaptable(module) and module is not head]
        foreign = [name for name, module in modules.items() if _is_foreign_linear(module) and module is not head]
        if foreign:
            _check_target(foreign[0], modules[foreign[0]])
        if not linear:
            raise UserError(f"target_modules='all-linear': {type(model).__name__} holds no linear layer to adapt")
        names = _shortest_names(linear, modules)
        # A full name would be adapted in any layer (see _in_layers); "all" is meant within the layers asked for.
        return [name for name in names if name not in modules or _in_layers(config, name)]
    found: list[str] | str = targets
    return found


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


def plan_modules_to_save(modules: dict[str, nn.Module], config: Any) -> list[str]:
    """Full names of the modules that a configuration wants a trained copy of.

    Raises:
        UserError: a name matches nothing, or what cannot be copied.
    """
    planned: list[str] = []
    for entry in config.modules_to_save or []:
        names = [name for name in modules if name.endswith(entry)]  # PEFT's rule, within a part of a name too
        if not names:
            raise UserError(f"modules_to_save: '{entry}' matches no module of the model; {near(entry, modules)}")
        for name in names:
            _check_module_to_save(name, modules[name])
        planned += [name for name in names if name not in planned]
    return planned


def plan_parameters(modules: dict[str, nn.Module], config: Any, every_name: bool) -> tuple[str, ...]:
    """Full names of the experts' weights that a configuration names, in the order of the model.

    Args:
        modules: of a model, by full name.
        config: its ``target_parameters`` are read, if it has them.
        every_name: refuse names that match nothing while others match.
    Raises:
        UserError: a name matches nothing, or what cannot be adapted.
    """
    entries = getattr(config, "target_parameters", None) or []
    if not entries:
        return ()
    named = {
        f"{path}.{name}": module
        for path, module in modules.items()
        for name in _parameter_names(module)
        if matches(entries, f"{path}.{name}")
    }
    for key, module in named.items():
        if not has_experts(module):
            raise UserError(
                f"target_parameters: '{key}' is in a {type(module).__name__}, which cannot be adapted so; what can is "
                "a mixture's experts with gate_up_proj and down_proj (experts, n, k), without biases. For linear "
                "layers use target_modules"
            )
    for entry in entries if every_name or not named else ():
        if not any(_ends_with(key, entry) for key in named):
            known = [f"{path}.{name}" for path, m in modules.items() if has_experts(m) for name in EXPERT_WEIGHTS]
            raise UserError(
                f"target_parameters: '{entry}' matches no weight of the model; "
                + (near(entry, known) if known else "it has no mixture of experts whose weights can be adapted")
            )
    return tuple(named)


def _parameter_names(module: nn.Module) -> list[str]:
    if isinstance(module, LoRAExperts):
        return list(EXPERT_WEIGHTS)
    return [] if isinstance(module, Adapted) else [name for name, _ in module.named_parameters(recurse=False)]


def _check_module_to_save(name: str, module: nn.Module) -> None:
    if isinstance(module, ModulesToSaveWrapper):
        return
    if isinstance(module, _CONTAINERS):
        raise UserError(
            f"modules_to_save: '{name}' is a {type(module).__name__}, which is never called itself; name the modules "
            "in it"
        )
    for part in module.modules():
        if isinstance(part, Adapted):
            raise UserError(f"modules_to_save: '{name}' already holds an adapter; a copy of it cannot be trained whole")
        if isinstance(part, NF4Module):
            raise UserError(
                f"modules_to_save: '{name}' is quantised to NF4, and packed weights cannot be trained; keep it dense "
                f"with quantize(model, skip=['{name.rpartition('.')[2]}'])"
            )


def _check_target(name: str, module: nn.Module, can_adapt: Callable[[nn.Module], bool] | None = None) -> None:
    if not (can_adapt or is_adaptable)(module):
        inner = [child for child, part in module.named_modules() if child and is_adaptable(part)]
        if _is_foreign_linear(module):
            advice = (
                "it has a forward pass or packed weights of its own; load the model dense and call "
                "fastpeft.quantize(model), or name other layers in target_modules"
            )
        elif inner:
            advice = f"name the linear layers in it: {', '.join(inner[:6])}"
        else:
            advice = "what can be adapted is torch.nn.Linear, Conv1D and NF4Linear; leave it out of target_modules"
        raise UserError(f"target_modules: '{name}' is a {type(module).__name__}, which cannot be adapted; {advice}")


def _check_names_are_used(
    model: nn.Module, config: Any, modules: dict[str, nn.Module], named: Sequence[str], kept: Sequence[str]
) -> None:
    linear = [name for name, module in modules.items() if is_adaptable(module)]
    if isinstance(config.target_modules, list) and named:
        for entry in config.target_modules:
            if not any(_ends_with(name, entry) for name in named):
                raise UserError(
                    f"target_modules: '{entry}' matches no module of the model; {_advice(model, entry, linear)}"
                )
    excluded = config.exclude_modules
    for entry in [excluded] if isinstance(excluded, str) else excluded or []:
        if not any(matches(excluded if isinstance(excluded, str) else [entry], name) for name in modules):
            raise UserError(f"exclude_modules: '{entry}' matches no module of the model; {near(entry, linear)}")
    layers = getattr(config, "layers_to_transform", None)
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


def _check_patterns(config: Any, adapted: Sequence[str]) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option, {}):
            if adapted and not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise UserError(f"{option}: '{pattern}' matches none of the adapted layers; {near(pattern, adapted)}")


def _nothing_matches(
    model: nn.Module, config: Any, modules: dict[str, nn.Module], named: Sequence[str], kept: Sequence[str]
) -> str:
    if kept:
        return f"layers_to_transform={config.layers_to_transform}: no target_modules in these layers"
    if named:
        return (
            f"target_modules={config.target_modules!r}: all {len(named)} matching modules are left out by "
            "exclude_modules or modules_to_save"
        )
    linear = [name for name, module in modules.items() if is_adaptable(module)]
    if isinstance(config.target_modules, str):
        advice = (
            f"a string must match whole names as a regular expression; linear layers: {_some_linear_names(modules)}"
        )
    else:
        advice = _advice(model, (config.target_modules or [""])[0], linear)
    return f"target_modules={config.target_modules!r} matches no module of the model; {advice}"


def matches(patterns: list[str] | str | None, name: str) -> bool:
    """Whether a module's name is meant by a list of names or by an expression."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(_ends_with(name, entry) for entry in patterns)


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _in_layers(config: Any, name: str) -> bool:
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or (isinstance(config.target_modules, list) and name in config.target_modules):
        return True  # a layer named in full is meant, whatever its number: PEFT's rule
    return _layer_index(config, name) in (layers if isinstance(layers, list) else [layers])


def _layer_index(config: Any, name: str) -> int | None:
    patterns = config.layers_pattern
    if not patterns:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
    found = (re.match(expression, name) for expression in expressions)
    return next((int(match[1]) for match in found if match), None)


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear layer, with adapters or without."""
    return isinstance(module, AdaptedLinear) or is_linear(module)


def _is_foreign_linear(module: nn.Module) -> bool:
    """A linear layer of another library, such as bitsandbytes' Linear4bit."""
    unused = nn.modules.linear.NonDynamicallyQuantizableLinear  # inside attention, where it is never called
    return isinstance(module, nn.Linear) and not isinstance(module, unused) and not is_adaptable(module)


def _advice(model: nn.Module, entry: str, linear: Iterable[str]) -> str:
    """What to write in place of a target that matches no module."""
    for path, module in model.named_modules():
        for name in _parameter_names(module):
            if not _ends_with(f"{path}.{name}", entry):
                continue
            if has_experts(module):
                last = path.rpartition(".")[2]
                return (
                    f"'{path}.{name}' is one weight of all experts of a layer; LoRA names it in "
                    f"target_parameters=['{last}.{name}']"
                )
            if module.get_parameter(name).dim() == 3:
                return (
                    f"'{path}.{name}' is one weight of all experts of a layer, in a form that adapters cannot stand "
                    "beside; adapt the attention, or put a bottleneck adapter after the layer's experts "
                    "(BottleneckAdapterConfig)"
                )
    return near(entry, linear)


def near(entry: str, names: Iterable[str]) -> str:
    """Say which names look like ``entry``, comparing with whole names and with their last parts."""
    names = list(names)
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    alike = difflib.get_close_matches(entry, leaves, n=3) or difflib.get_close_matches(entry, names, n=3)
    if alike:
        return f"did you mean {' or '.join(map(repr, alike))}?"
    return f"the names end in: {', '.join(leaves[:12])}"


def _some_linear_names(modules: dict[str, nn.Module]) -> str:
    leaves = dict.fromkeys(name.rpartition(".")[2] for name, module in modules.items() if is_adaptable(module))
    return ", ".join(list(leaves)[:12]) or "none"
