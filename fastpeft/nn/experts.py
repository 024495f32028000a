"""The experts of a mixture as transformers keeps them: two three-dimensional parameters of one module.

    gate_up_proj   (experts, 2 i, h)   both halves of the gated product
    down_proj      (experts, h, i)

Each token's row is copied once for each of its experts and sorted by them, so that a product takes all experts at once;
the results go back to their tokens, weighed, in one sum. Here is what `NF4Experts` and `LoRAExperts` share, and how a
module is known that computes just that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.nn.base_weight import with_parameters
from fastpeft.nn.gated import agree, find_gate, gated
from fastpeft.ops.experts import Routing, collect_rows, route, spread_rows

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
_TOLERANCE = 1e-4

Product = Callable[[str, Tensor, Routing], Tensor]  # by the weight of a name, of rows that are sorted by expert
Gate = Callable[[Tensor], Tensor]


def apply_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int, product: Product, gate: Gate
) -> Tensor:
    """``sum_j weight_j down_j(gate(gate_up_j(x)))`` over each token's experts j.

    Args:
        hidden_states: ``(tokens, h)``.
        top_k_index: ``(tokens, k)``, int64: a token's experts.
        top_k_weights: ``(tokens, k)``, floating: their shares.
        experts: how many there are.
        product: multiplies by one of the weights.
        gate: ``(rows, 2 i)`` to ``(rows, i)``.
    Returns:
        ``(tokens, h)``, dtype of ``hidden_states``.
    """
    routing = route(top_k_index, experts)
    up, down = EXPERT_WEIGHTS
    inner = gate(product(up, spread_rows(hidden_states, routing.place), routing))
    return collect_rows(product(down, inner, routing), routing.place, top_k_weights).to(hidden_states.dtype)


def gate_of(experts: nn.Module) -> Gate:
    """What stands between the two products of a dense module, by one op where there is one that computes it."""
    own = _own_gate(experts)
    activation = find_gate(own)
    return own if activation is None else partial(_gated, activation)


def _gated(activation: str, gate_up: Tensor) -> Tensor:
    return gated(gate_up, None, activation)


def _own_gate(experts: Any) -> Gate:
    """A module's own: transformers' classes have a method for it."""
    own: Gate | None = getattr(experts, "_apply_gate", None)

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        out: Tensor = experts.act_fn(gate) * up
        return out

    return plain if own is None else own


def is_experts(module: nn.Module) -> bool:
    """Whether a dense module is the experts of a mixture in the form that `apply_experts` computes.

    Told from the two weights, which may be on the meta device, and confirmed by numbers: the class's own forward runs
    on a small random input and weights. So neither transposed nor interleaved halves pass, nor biases, norms behind the
    experts, or a forward that does another thing. Experts that are spread over devices do not either.

    Args:
        module: any module.
    """
    weights = [module._parameters.get(name) for name in EXPERT_WEIGHTS]
    if any(weight is None or not weight.is_floating_point() for weight in weights):
        return False
    gate_up, down = (tuple(weight.shape) for weight in weights if weight is not None)
    alone = len(list(module.parameters())) == len(EXPERT_WEIGHTS) and not any(True for _ in module.buffers())
    whole = not getattr(module, "_is_expert_parallel", False)
    return fit(gate_up, down) and alone and whole and _agrees(module)


def fit(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether two shapes are ``(experts, 2 i, h)`` and ``(experts, h, i)``."""
    return len(gate_up) == len(down) == 3 and (gate_up[0], gate_up[2], gate_up[1]) == (down[0], down[1], 2 * down[2])


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    """Whether a module's own forward, over small weights, is the sum over experts."""
    experts, tokens, chosen, hidden, inner = 3, 6, 2, 4, 8
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")

    w1, w2, x = random(experts, 2 * inner, hidden), random(experts, hidden, inner), random(tokens, hidden)
    shares = random(tokens, chosen).softmax(-1)
    ids = random(tokens, experts).topk(chosen, dim=-1).indices
    probed: Any = with_parameters(module, gate_up_proj=w1, down_proj=w2)
    if hasattr(probed, "num_experts"):
        probed.num_experts = experts
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            own = inspect.unwrap(type(module).forward)(probed, x, ids, shares)
            each = torch.einsum("tei,ehi->teh", _own_gate(probed)(torch.einsum("th,eih->tei", x, w1)), w2)
    except Exception:  # a probe may run into anything in a module that only looks alike
        return False
    expected = (each.gather(1, ids[..., None].expand(-1, -1, hidden)) * shares[..., None]).sum(1)
    return isinstance(own, Tensor) and agree(own, expected, _TOLERANCE)
