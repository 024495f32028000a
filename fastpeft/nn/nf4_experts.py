"""``NF4Experts``: the experts of a mixture, whose weights are held in 4 bits.

transformers keeps all experts of a layer as two parameters of one module, and so do these:

    gate_up_proj   (experts, 2 i, h)   both halves of the gated product
    down_proj      (experts, h, i)

Each token's row is copied once for each of its experts and sorted by them, so that a product takes all experts at once;
the results go back to their tokens, weighed, in one sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.nn.base_weight import with_parameters
from fastpeft.nn.gated import agree, find_gate, gated
from fastpeft.nn.nf4_module import NF4Module
from fastpeft.ops import NF4Weight, nf4_dequantize, nf4_linear_experts, nf4_quantize
from fastpeft.ops.experts import collect_rows, route, spread_rows
from fastpeft.ops.experts import collect_rows, route, spread_rows

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
_PLUMBING = frozenset(vars(nn.Module()))
_TOLERANCE = 1e-4


class NF4Experts(NF4Module):
    """``sum_j weight_j W2_j (act(gate_j x) * up_j x)`` over a token's experts, with all W in NF4.

    Takes the place of a module that `is_experts` knows, and has its settings and parts (``num_experts``, ``config``,
    ``act_fn``). Its ``state_dict`` has the keys and bytes of bitsandbytes' ``replace_parameter_4bit``.

    Args:
        experts: that module; its weights are not looked at, and not kept.
        gate_up_proj: the quantised ``(experts, 2 * i, h)`` weight.
        down_proj: the quantised ``(experts, h, i)`` weight.
    Attributes:
        gate_up_proj: the packed codes, uint8, a parameter without gradient.
        down_proj: likewise.
    Raises:
        ValueError: the shapes do not fit each other, or an expert's weight is not made of whole blocks.
    Source:
        QLoRA, arXiv 2305.14314.
    """

    def __init__(self, experts: nn.Module, gate_up_proj: NF4Weight, down_proj: NF4Weight) -> None:
        super().__init__(gate_up_proj=gate_up_proj, down_proj=down_proj)
        if not _fit(gate_up_proj.shape, down_proj.shape):
            raise ValueError(
                f"NF4Experts: gate_up_proj has shape {gate_up_proj.shape} and down_proj {down_proj.shape}; they must "
                "be (experts, 2 * i, h) and (experts, h, i)"
            )
        for name, nf4 in self.packed.items():
            if not whole_blocks(nf4.shape, nf4.block_size):
                raise ValueError(
                    f"NF4Experts: {name} has shape {nf4.shape}; the size of an expert's part must be a multiple of the "
                    f"block size, {nf4.block_size}"
                )
        self.__dict__.update({name: value for name, value in vars(experts).items() if name not in _PLUMBING})
        self.__dict__.pop("forward", None)  # of another library, over weights that are gone
        self._modules = dict(experts._modules)
        self.training = experts.training
        meta = {n: torch.empty(w.shape, dtype=w.dtype, device="meta") for n, w in self.packed.items()}
        # In a tuple, so that it is no part of this module: what the dense module is made of again.
        self._shell = (with_parameters(experts, **meta),)
        self._shell[0].__dict__["_modules"] = self._modules
        self._activation = find_gate(_gate_of(self._shell[0]))

    @classmethod
    def from_experts(cls, experts: nn.Module, block_size: int = 64, double_quant: bool = True) -> NF4Experts:
        """Quantise a dense module, which itself is left as it is.

        Args:
            experts: a module that `is_experts` knows; float32, float16 or bfloat16.
            block_size: weights a scale covers, 32 to 4096.
            double_quant: quantise the scales too.
        """
        weights = {name: nf4_quantize(experts.get_parameter(name), block_size, double_quant) for name in EXPERT_WEIGHTS}
        return cls(experts, **weights)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module whose place this one took, over the values that the codes stand for, frozen.

        Args:
            dtype: of its weights; None for the one each was quantised from.
        """
        dense = with_parameters(
            self._shell[0], **{name: nf4_dequantize(nf4, dtype) for name, nf4 in self._packed.items()}
        )
        dense.__dict__["_modules"] = dict(self._modules)
        return dense.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply each token's experts.

        Args:
            hidden_states: ``(tokens, h)``; float32, float16 or bfloat16.
            top_k_index: ``(tokens, k)``, int64: a token's experts.
            top_k_weights: ``(tokens, k)``, floating: their shares.
        Returns:
            ``(tokens, h)``, dtype of ``hidden_states``.
        """
        w1, w2 = self._packed["gate_up_proj"], self._packed["down_proj"]
        routing = route(top_k_index, w1.shape[0])
        rows = spread_rows(hidden_states, routing.place)
        gate_up = nf4_linear_experts(rows, w1, routing.ends)
        inner = (
            _gate_of(self._shell[0])(gate_up) if self._activation is None else gated(gate_up, None, self._activation)
        )
        out = nf4_linear_experts(inner, w2, routing.ends)
        return collect_rows(out, routing.place, top_k_weights).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Sizes, and how they are packed."""
        nf4 = self._packed["down_proj"]
        experts, hidden, intermediate = nf4.shape
        scales = "double-quantised" if nf4.double_quant else "float32"
        return (
            f"experts={experts}, hidden={hidden}, intermediate={intermediate}, block_size={nf4.block_size}, "
            f"scales={scales}"
        )


def whole_blocks(shape: tuple[int, ...], block_size: int) -> bool:
    """Whether each expert's part of a ``(experts, n, k)`` weight is made of whole blocks."""
    return shape[1] * shape[2] % block_size == 0


def is_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture in the form that `NF4Experts` computes.

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
    return _fit(gate_up, down) and alone and whole and _agrees(module)


def _fit(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(gate_up) == len(down) == 3 and (gate_up[0], gate_up[2], gate_up[1]) == (down[0], down[1], 2 * down[2])


def _gate_of(experts: Any) -> Callable[[Tensor], Tensor]:
    """What a module does between its two products: transformers' classes have a method for it."""
    own: Callable[[Tensor], Tensor] | None = getattr(experts, "_apply_gate", None)

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        out: Tensor = experts.act_fn(gate) * up
        return out

    return plain if own is None else own


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
            each = torch.einsum("tei,ehi->teh", _gate_of(probed)(torch.einsum("th,eih->tei", x, w1)), w2)
    except Exception:  # a probe may run into anything in a module that only looks alike
        return False
    expected = (each.gather(1, ids[..., None].expand(-1, -1, hidden)) * shares[..., None]).sum(1)
    return isinstance(own, Tensor) and agree(own, expected, _TOLERANCE)
