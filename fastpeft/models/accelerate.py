"""``accelerate(model)``: fused ops in a Hugging Face model, in place, and ``restore(model)``, which undoes it.

A module that is recognised (`structure`, `causal_lm`) gets a forward of its own (`fused`) as an attribute of that one
instance; classes, parameters, module names and files stay what they are, and so do other models. What is not recognised
keeps its forward, and the report says why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from fastpeft.errors import UserError, did_you_mean
from fastpeft.models import fused
from fastpeft.models.causal_lm import looks_like_causal_lm, make_forward, read_causal_lm
from fastpeft.models.checkpointing import Checkpointing, Shared
from fastpeft.models.fused import CHECKPOINTING, STRUCTURE
from fastpeft.models.offload import Shelf
from fastpeft.models.plan import MODES, Planner
from fastpeft.models.structure import (
    MLP,
    Layer,
    Random,
    Unknown,
    difference,
    holds_experts,
    looks_like_attention,
    looks_like_layer,
    looks_like_mlp,
    looks_like_norm,
    probing,
    read_attention,
    read_layer,
    read_mlp,
    read_norm,
    shallow_copy,
    tolerance,
)

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)
_TOKENS = 5
_SHOWN = 8  # modules that a printed report names for one reason


@dataclass(frozen=True)
class Left:
    """A module that keeps its own forward.

    Attributes:
        name: full name; empty for the model itself.
        kind: what it was taken for: norm, mlp, attention, layer, loss or model.
        reason: why it was left.
    """

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What ``accelerate`` did.

    Attributes:
        replaced: number of modules with a fused forward, by kind: norm, mlp, attention, layer, loss.
        left: modules that look like one of these kinds and keep their own forward.
    """

    replaced: dict[str, int] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in self.replaced.items()) or "nothing"
        lines = [f"fused: {done}"]
        groups: dict[tuple[str, str], list[str]] = {}
        for left in self.left:
            groups.setdefault((left.kind, left.reason), []).append(left.name or "the model")
        for (kind, reason), names in groups.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"left as it was: {kind} {', '.join(names[:_SHOWN])}{more}: {reason}")
        return "\n".join(lines)


def accelerate(
    model: _Model,
    *,
    norm: bool = True,
    rope: bool = True,
    mlp: bool = True,
    loss: bool = True,
    checkpointing: str | None = None,
    activation_budget_gb: float | None = None,
) -> _Model:
    """Put fused ops into a model, in place.

    Works on Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text), Phi-3, SmolLM2 and whatever has their structure:
    RMS norms (with the residual sum before them), rotary positions, gated MLPs, and the loss in training, which is then
    computed without logits (``logits`` is None; ``model(..., skip_logits=False)`` gives both). State dict, module
    names, adapters (before or after), `generate` and gradient checkpointing work as before. LoRA layers that share an
    input, such as q, k and v, are computed together under one dropout mask, where their dropout is equal. A second call
    does what the first one left out.

    Args:
        model: a loaded model, with or without adapters.
        norm: RMS norms, alone and with the sum before them.
        rope: attention with rotary positions; the attention function itself stays transformers'.
        mlp: gated MLPs.
        loss: output layer and cross-entropy.
        checkpointing: what layers recompute in backward (`fastpeft.models.checkpointing`): "full", "selective",
            "offload" or "none". None changes nothing now; `gradient_checkpointing_enable` then means "full".
        activation_budget_gb: with "selective", 10^9 bytes that the layers may keep between forward and backward.
    Returns:
        The same model. ``fastpeft.models.report(model)`` tells what was replaced and what was left, and why.
    Raises:
        UserError: an unknown kind of checkpointing, or a budget that cannot be used.
    """
    if activation_budget_gb is not None and checkpointing is None:
        checkpointing = "selective"
    check_checkpointing(checkpointing, activation_budget_gb)
    found = Report()
    counts: Counter[str] = Counter()
    for kind, name, change in _changes(model, norm, rope, mlp, loss):
        try:
            change()
        except Unknown as reason:
            found.left.append(Left(name, kind, str(reason)))
        except Exception as error:  # a probe may run into anything in a module that only looks alike
            found.left.append(Left(name, kind, f"it failed on a probe: {type(error).__name__}: {error}"))
        else:
            counts[kind] += 1
    found.replaced = dict(counts)
    if not counts["layer"] and not counts["norm"]:
        found.left.append(Left("", "model", f"{type(model).__name__} has no decoder layers of a known structure"))
    model.__dict__[_REPORT] = found
    _prepare_checkpointing(model, checkpointing, activation_budget_gb)
    logger.info("accelerate: %s", found)
    return model


def restore(model: _Model) -> _Model:
    """Give every module of a model its own forward back.

    Args:
        model: changed in place; a model that was never accelerated stays as it is.
    Returns:
        The same model.
    """
    for module in model.modules():
        own = module.__dict__
        if STRUCTURE in own:
            del own[STRUCTURE]
            # Another library may have put its own forward around ours; ours then hands on to the class's.
            if _is_ours(own.get("forward")):
                del own["forward"]
        for name in (_REPORT, CHECKPOINTING, SETTINGS):
            own.pop(name, None)
        if _is_ours(own.get(_SWITCH)):
            del own[_SWITCH]
    return model


def report(model: nn.Module) -> Report | None:
    """What ``accelerate`` replaced and left in a model; None where it was not called.

    Args:
        model: the model that was accelerated, or a wrapper around it.
    """
    return next((m.__dict__[_REPORT] for m in model.modules() if _REPORT in m.__dict__), None)


_REPORT = "_fastpeft_report"
_MARK = "_fastpeft_forward"


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, MethodType) and hasattr(forward.__func__, _MARK)


def _install(module: nn.Module, structure: Any, forward: Callable[..., Any]) -> None:
    if "forward" in module.__dict__ and not _is_ours(module.__dict__["forward"]):
        raise Unknown("another library has replaced its forward")
    setattr(forward, _MARK, True)
    module.__dict__[STRUCTURE] = structure
    module.__dict__["forward"] = MethodType(forward, module)


# --- checkpointing ---
_SWITCH = "_set_gradient_checkpointing"
SETTINGS = "_fastpeft_checkpointing_settings"


def check_checkpointing(mode: str | None, budget_gb: float | None) -> None:
    """Refuse what ``accelerate`` cannot do.

    Args:
        mode: its ``checkpointing``.
        budget_gb: its ``activation_budget_gb``.
    Raises:
        UserError: an unknown mode, or a budget that is none or has nothing to do with the mode.
    """
    if mode is not None and mode not in MODES:
        raise UserError(
            f"accelerate: checkpointing is {mode!r}; it must be {', '.join(MODES)}{did_you_mean(mode, MODES)}"
        )
    if budget_gb is not None and (mode != "selective" or not 0 < budget_gb < float("inf")):
        raise UserError(
            f"accelerate: activation_budget_gb is {budget_gb} with checkpointing={mode!r}; a budget is a number of "
            "gigabytes above 0, for checkpointing='selective'"
        )


def _prepare_checkpointing(model: nn.Module, mode: str | None, budget_gb: float | None) -> None:
    """Set how the layers are checkpointed, now and when transformers' own switch is used.

    The switch sets a flag on each layer, and transformers would then run the whole layer again. Ours reads the flag and
    clears it.
    """
    enabled = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for module in model.modules():
        if hasattr(type(module), _SWITCH) and _fused_layers(module):
            module.__dict__[SETTINGS] = (mode if mode not in (None, "none") else "full", budget_gb)
            own = module.__dict__.get(_SWITCH)
            if own is None or _is_ours(own):
                module.__dict__[_SWITCH] = MethodType(_switch(type(module)), module)
    if mode is not None or enabled:
        _checkpoint(model, "full" if mode is None else mode, budget_gb)


def _switch(kind: type) -> Callable[..., None]:
    own = getattr(kind, _SWITCH)

    @wraps(own)
    def switch(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        mode, budget_gb = self.__dict__.get(SETTINGS, ("none", None))
        if SETTINGS in self.__dict__:
            enable = args[0] if args else kwargs.get("enable", True)
            _checkpoint(self, mode if enable else "none", budget_gb)

    setattr(switch, _MARK, True)
    return switch


def _fused_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module.__dict__.get(STRUCTURE), Layer)]


def _checkpoint(model: nn.Module, mode: str, budget_gb: float | None) -> None:
    layers = _fused_layers(model)
    budget = None if budget_gb is None else int(budget_gb * 1e9)
    shared = Shared(Planner(mode, budget, len(layers)), Shelf())  # type: ignore[arg-type]
    for index, layer in enumerate(layers):
        if mode == "none":
            layer.__dict__.pop(CHECKPOINTING, None)
        else:
            layer.__dict__[CHECKPOINTING] = Checkpointing(shared, index)
        if getattr(layer, "gradient_checkpointing", False):
            layer.gradient_checkpointing = False  # type: ignore[assignment]


# --- what there is to change ---
_Change = tuple[str, str, Callable[[], None]]


def _changes(model: nn.Module, norm: bool, rope: bool, mlp: bool, loss: bool) -> Iterator[_Change]:
    """Kind, name and deed of every module that looks like a kind; norms come before the layers they stand in."""
    probes = _Probes()
    modules = list(model.named_modules())
    for name, module in modules:
        if norm and looks_like_norm(module):
            yield "norm", name, partial(probes.change_norm, module)
    for name, module in modules:
        if not looks_like_layer(module):
            continue
        attention, gated, like = (getattr(module, part) for part in ("self_attn", "mlp", "input_layernorm"))
        like = getattr(like, "weight", None)
        if not isinstance(like, Tensor):
            yield "layer", name, partial(_refuse, "its input_layernorm has no weight")
            continue
        if rope:
            yield "attention", f"{name}.self_attn", partial(probes.change_attention, attention, like)
        if mlp and not holds_experts(gated):
            yield "mlp", f"{name}.mlp", partial(probes.change_mlp, gated, like)
        if norm:
            yield "layer", name, partial(probes.change_layer, module, like)
    for name, module in modules:
        if loss and looks_like_causal_lm(module):
            yield "loss", name, partial(probes.change_loss, module)


def _refuse(reason: str) -> None:
    raise Unknown(reason)


class _Probes:
    """Reads a module's structure, confirms it on a random input, and installs the fused forward.

    Modules of one class, parts, sizes and settings are probed once.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def _once(self, key: Any, read: Callable[[], Any]) -> Any:
        if key not in self._known:
            try:
                self._known[key] = read()
            except Unknown as reason:
                self._known[key] = reason
        if isinstance(self._known[key], Unknown):
            raise self._known[key]
        return self._known[key]

    def change_norm(self, module: nn.Module) -> None:
        structure = self._once(("norm", _signature(module)), partial(read_norm, module))
        _install(module, structure, fused.norm_forward)

    def change_attention(self, module: nn.Module, like: Tensor) -> None:
        if not looks_like_attention(module):
            raise Unknown("it has no q_proj, k_proj, v_proj (or qkv_proj) and o_proj")
        structure, probe = read_attention(module, like)
        with probing(module):
            heads = fused.query_key_value(module, structure, probe.x, probe.positions)
        if any(
            not difference(one, own) <= tolerance(like)
            for one, own in zip(heads, (probe.q, probe.k, probe.v), strict=True)
        ):
            raise Unknown("it computes q, k and v in another way")
        _install(module, structure, fused.attention_forward)

    def change_mlp(self, module: nn.Module, like: Tensor) -> None:
        if not looks_like_mlp(module):
            raise Unknown("it has no gate_proj and up_proj (or gate_up_proj) and down_proj")

        def read() -> MLP:
            structure = read_mlp(module)
            x = Random(like)(1, _TOKENS, like.shape[0])
            with probing(module):
                own, out = type(module).forward(module, x), fused.apply_mlp(module, structure, x)
            if not difference(out, own) <= tolerance(like):
                raise Unknown("it computes something else than a gated MLP")
            return structure

        _install(module, self._once(("mlp", _signature(module), like.dtype), read), fused.mlp_forward)

    def change_layer(self, module: nn.Module, like: Tensor) -> None:
        def read() -> Layer:
            structure = read_layer(module)
            x = Random(like)(1, _TOKENS, like.shape[0])
            probed = shallow_copy(module)
            probed._modules.update(self_attn=_StandIn(returns_weights=True), mlp=_StandIn(returns_weights=False))
            with probing(probed):
                own = probed(x, attention_mask=None, position_embeddings=None)
                out = fused.plain_layer(probed, structure, x, attention_mask=None, position_embeddings=None)
            if not isinstance(own, Tensor) or not difference(out, own) <= tolerance(like):
                raise Unknown("it computes something else than a pre-norm layer")
            return structure

        shape = _signature(module, depth=1)
        _install(module, self._once(("layer", shape, like.dtype), read), fused.layer_forward)

    def change_loss(self, module: nn.Module) -> None:
        structure = read_causal_lm(module)
        _install(module, structure, make_forward(type(module).forward))


class _StandIn(nn.Module):
    """Takes the place of attention or the MLP while the sums and norms around them are probed."""

    def __init__(self, returns_weights: bool) -> None:
        super().__init__()
        self._returns_weights = returns_weights

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Some function of the input."""
        out = hidden_states.tanh() * 3
        return (out, None) if self._returns_weights else out


def _signature(module: nn.Module, depth: int = 3) -> Any:
    """What two modules that compute the same have in common: classes, shapes, dtypes, devices and plain settings."""
    settings = tuple(
        sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "layer_idx")
    )
    weights = tuple((n, tuple(p.shape), p.dtype, p.device) for n, p in module.named_parameters(recurse=False))
    parts = tuple((name, _signature(part, depth - 1)) for name, part in module.named_children()) if depth else ()
    return type(module), settings, weights, parts
