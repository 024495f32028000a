"""``NF4Experts``: the experts of a mixture, whose weights are held in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.nn.base_weight import with_parameters
from fastpeft.nn.experts import EXPERT_WEIGHTS, apply_experts, fit, gate_of
from fastpeft.nn.nf4_module import NF4Module
from fastpeft.ops import NF4Weight, nf4_dequantize, nf4_linear_experts, nf4_quantize
from fastpeft.ops.experts import Routing

_PLUMBING = frozenset(vars(nn.Module()))


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
        if not fit(gate_up_proj.shape, down_proj.shape):
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
        self.gate = gate_of(self._shell[0])

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
        return self.dense_with(**{name: nf4_dequantize(nf4, dtype) for name, nf4 in self._packed.items()})

    def dense_with(self, **weights: Tensor) -> nn.Module:
        """The module whose place this one took, over other weights, frozen.

        Args:
            weights: of the shapes of the packed ones, by their names.
        """
        dense = with_parameters(self._shell[0], **weights)
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
        experts = self._packed[EXPERT_WEIGHTS[0]].shape[0]
        return apply_experts(hidden_states, top_k_index, top_k_weights, experts, self.product, self.gate)

    def product(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """Multiply rows that are sorted by expert by one of the weights (`fastpeft.nn.experts.Product`)."""
        return nf4_linear_experts(x, self._packed[name], routing.ends)

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
