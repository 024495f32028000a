"""What the modules of a transformer compute, told from their structure and confirmed by numbers.

Nothing here knows a family by name. A module is taken for a norm, an MLP, an attention or a decoder layer by its
attributes and the shapes of its weights; its own forward then runs once on a small random input, and only where the
fused one agrees is it replaced. A module that looks alike and computes something else is found out this way, whatever
it is called and however a later transformers changes it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.nn.gated import ACTIVATIONS, find_activation
from fastpeft.nn.lora_experts import has_experts
from fastpeft.ops import rms_norm

# Largest relative difference (norms) between a module's own output and the fused one on the probe: some units in the
# last place, since the order of roundings may differ.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_TOKENS = 5


class Unknown(Exception):
    """A module is not what it was taken for; the message is the reason in the report."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: ``x / rms(x) * (offset + weight)``.

    Attributes:
        eps: added to the mean square.
        offset: 1 where weights are stored less one.
        cast_first: round to the input's dtype before the weight is applied.
    """

    eps: float
    offset: float
    cast_first: bool


@dataclass(frozen=True)
class MLP:
    """``down(act(gate) * up)``.

    Attributes:
        projections: names of the layers that read the input; one name where gate and up are one layer.
        activation: a key of `ACTIVATIONS`.
    """

    projections: tuple[str, ...]
    activation: str


@dataclass(frozen=True)
class Attention:
    """Attention with rotary positions.

    Attributes:
        projections: names of the layers that read the input; one name where q, k and v are one layer.
        widths: features of q, k and v.
        head_dim: features of a head.
        norms: names of the norms of q and k over a head, or nothing.
        home: the Python module that holds its table of attention functions.
        options: what it gives its attention function besides dropout, as read from a call of its own.
    """

    projections: tuple[str, ...]
    widths: tuple[int, ...]
    head_dim: int
    norms: tuple[str, ...]
    home: str
    options: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Layer:
    """A decoder layer: ``h += attention(norm(h)); h += mlp(norm(h))``.

    Attributes:
        before_mlp: name of the norm whose input is the first sum.
        after: names of the norms of attention's and the MLP's output, or nothing.
    """

    before_mlp: str
    after: tuple[str, ...]


# --- norms ---
def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module has a weight vector, an epsilon, and nothing else."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and isinstance(_epsilon(module), float)
        and not any(True for _ in module.children())
        and len(list(module.parameters())) == 1
    )


def read_norm(module: nn.Module) -> Norm:
    """Find the RMS norm that a module computes.

    Raises:
        Unknown: it is none.
    """
    weight, eps = module.weight, _epsilon(module)
    assert isinstance(weight, Tensor) and isinstance(eps, float)
    random = Random(weight)
    x, values = random(2, _TOKENS, weight.shape[0]), 1 + 0.5 * random(weight.shape[0])
    with probing(module):
        own = torch.func.functional_call(module, {"weight": values}, (x,))
    candidates = [Norm(eps, offset, cast_first) for offset in (0.0, 1.0) for cast_first in (True, False)]
    errors = [
        difference(rms_norm(x, values, eps, offset=norm.offset, cast_first=norm.cast_first), own) for norm in candidates
    ]
    best = min(range(len(candidates)), key=errors.__getitem__)
    if not errors[best] <= tolerance(x):
        raise Unknown(f"{type(module).__name__} is not an RMS norm")
    return candidates[best]


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


# --- MLP ---
def looks_like_mlp(module: nn.Module) -> bool:
    """Whether a module has a down-projection, and a gate and an up-projection, apart or in one."""
    return hasattr(module, "down_proj") and (
        (hasattr(module, "gate_proj") and hasattr(module, "up_proj")) or hasattr(module, "gate_up_proj")
    )


def holds_experts(module: nn.Module) -> bool:
    """Whether a module chooses between experts: no gated MLP, and nothing to complain of."""
    return any(map(has_experts, module.children()))


def read_mlp(module: nn.Module) -> MLP:
    """Find the activation and the layers of a gated MLP.

    Raises:
        Unknown: its activation is another one, or it has parts that do not belong to a gated MLP.
    """
    projections = ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")
    act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    foreign = _foreign(module, (*projections, "down_proj"))
    if not callable(act) or foreign:
        raise Unknown(f"it has {', '.join(foreign)} besides its projections" if foreign else "it has no activation")
    activation = find_activation(act)
    if activation is not None:
        return MLP(projections, activation)
    raise Unknown(f"its activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}")


# --- attention ---
class AttentionProbe(NamedTuple):
    """What an attention module gave its attention function on a random input."""

    x: Tensor
    positions: tuple[Tensor, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module has an output projection and projections of q, k and v, apart or in one."""
    return hasattr(module, "o_proj") and (
        all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj")) or hasattr(module, "qkv_proj")
    )


def read_attention(module: nn.Module, like: Tensor) -> tuple[Attention, AttentionProbe]:
    """Find the layers of an attention module and what it tells its attention function.

    Args:
        module: what looks like attention.
        like: the weight of the norm before it.
    Returns:
        The structure, and a call of its own to compare with.
    Raises:
        Unknown: a part is missing, or there is one too many.
    """
    config: Any = getattr(module, "config", None)
    head_dim, home = getattr(module, "head_dim", None), type(module).__module__
    if config is None or not isinstance(head_dim, int) or not hasattr(module, "attention_dropout"):
        raise Unknown("it has no config, head_dim or attention_dropout")
    projections = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    norms = tuple(name for name in ("q_norm", "k_norm") if isinstance(getattr(module, name, None), nn.Module))
    foreign = _foreign(module, (*projections, *norms, "o_proj"))
    if foreign or len(norms) == 1:
        raise Unknown(f"it has {', '.join(foreign or norms)} besides its projections")
    if any(getattr(getattr(module, name), "weight", like).shape != (head_dim,) for name in norms):
        raise Unknown("its norms of q and k are not over a head")
    probe = _probe_attention(module, like, head_dim)
    options = {name: value for name, value in probe.options.items() if name != "dropout"}
    if any(isinstance(value, Tensor) for value in options.values()):
        raise Unknown("it gives its attention function further tensors")
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return Attention(projections, tuple(n * head_dim for n in heads), head_dim, norms, home, options), probe


def _probe_attention(module: nn.Module, like: Tensor, head_dim: int) -> AttentionProbe:
    """Run a copy of the module, which shares its weights, with an attention function that records its arguments."""
    functions = getattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        raise Unknown("its file has no table of attention functions")
    random = Random(like)
    x = random(1, _TOKENS, like.shape[0])
    angles = 3 * random(1, _TOKENS, _rotary_dim(module.config, head_dim) // 2)
    angles = torch.cat((angles, angles), -1)
    positions = (angles.cos(), angles.sin())
    seen: list[Any] = []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        seen.append((q, k, v, options))
        return q.transpose(1, 2).contiguous(), None

    probed = shallow_copy(module)
    probed.config = config = copy.copy(probed.config)  # type: ignore[assignment, arg-type]
    config._attn_implementation_internal = _PROBE  # type: ignore[union-attr]
    functions[_PROBE] = record
    try:
        with probing(probed):
            probed(hidden_states=x, position_embeddings=positions, attention_mask=None)
    finally:
        del functions[_PROBE]
    if len(seen) != 1:
        raise Unknown("it does not call its attention function")
    return AttentionProbe(x, positions, *seen[0])


_PROBE = "fastpeft_probe"


def _rotary_dim(config: Any, head_dim: int) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    factor = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return int(head_dim * (1.0 if factor is None else factor))


# --- layers ---
def looks_like_layer(module: nn.Module) -> bool:
    """Whether a module has attention, an MLP, and norms before both."""
    names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def read_layer(module: nn.Module) -> Layer:
    """Find the norms of a decoder layer.

    Raises:
        Unknown: it has a dropout that is on, or parts of another kind.
    """
    outer = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    sandwich = all(hasattr(module, name) for name in outer)
    known = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", *(outer if sandwich else ()))
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            if child.p > 0:
                raise Unknown(f"{name} drops {child.p:g} of its input")
        elif name not in known:
            raise Unknown(f"it has {name}, which is no part of a pre-norm layer")
    if sandwich:
        return Layer("pre_feedforward_layernorm", ("post_attention_layernorm", "post_feedforward_layernorm"))
    return Layer("post_attention_layernorm", ())


# --- probes ---
class Random:
    """Random inputs of a weight's device and dtype, from a generator of its own: the user's stays as it is."""

    def __init__(self, like: Tensor) -> None:
        if like.is_meta:
            raise Unknown("its weights are on the meta device")
        self._like = like
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """The next one."""
        return torch.randn(shape, generator=self._generator).to(self._like)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class over the same parts, whose parts can be exchanged, with its class's own forward."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    copied.__dict__.pop("forward", None)
    return copied


def _foreign(module: nn.Module, known: tuple[str, ...]) -> list[str]:
    """Names of parts with weights that are not among the known ones."""
    return [n for n, part in module.named_children() if n not in known and any(True for _ in part.parameters())]


@contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """Run a module without gradients, dropout or autocast, and leave its mode as it was."""
    modes = [(part, part.training) for part in module.modules()]
    device = next((p.device.type for p in module.parameters()), "cpu")
    try:
        module.eval()
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for part, training in modes:
            part.training = training


def difference(one: Tensor, other: Tensor) -> float:
    """Relative difference of two tensors; infinite where their shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def tolerance(x: Tensor) -> float:
    """What `difference` may be for tensors of this dtype."""
    return _TOLERANCE[x.dtype]
