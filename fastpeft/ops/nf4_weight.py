"""``NF4Weight``: a quantised tensor and the keys under which it is stored.

The keys and bytes are those that bitsandbytes' ``Linear4bit`` writes, and for a parameter of another name its
``replace_parameter_4bit``, so checkpoints move both ways.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
STATE_KEY = "quant_state.bitsandbytes__nf4"

# Operands of one weight as the ops take them: codes, absmax, nested_absmax, nested_map, offset, block_size.
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int]


@dataclass(frozen=True)
class NF4Weight:
    """A tensor in 4-bit normal-float blocks.

    Args:
        codes: ``((numel + 1) // 2, 1)``, uint8; two codes a byte, the high nibble first, in row-major order.
        absmax: ``(blocks,)``, one scale a block: float32, or uint8 indices into ``nested_map`` (double quantised).
        nested_absmax: ``(ceil(blocks / 256),)``, float32; None unless double quantised, like the next two.
        nested_map: ``(256,)``, float32, ascending: the signed dynamic map.
        offset: ``()``, float32, the mean of the scales.
        shape: shape of the tensor that was quantised; ``(n, k)`` for a linear weight.
        block_size: elements a scale covers.
        dtype: dtype of the tensor that was quantised, and what it is dequantised to by default.
    Source:
        QLoRA, arXiv 2305.14314, sections 3 and 4.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        blocks = -(-self.numel // self.block_size)
        expected = {"codes": (self.codes, (self.numel + 1) // 2), "absmax": (self.absmax, blocks)}
        if self.nested_absmax is not None:
            expected["nested_absmax"] = (self.nested_absmax, -(-blocks // NESTED_BLOCK_SIZE))
        for name, (tensor, size) in expected.items():
            if tensor.numel() != size:
                raise ValueError(
                    f"NF4Weight: {name} has {tensor.numel()} elements; a weight of shape {self.shape} with block size "
                    f"{self.block_size} needs {size}"
                )

    @property
    def numel(self) -> int:
        """Number of quantised elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def n(self) -> int:
        """Rows: out_features of a linear weight."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Columns: in_features of a linear weight."""
        return self.shape[1]

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the 1 KB map, which all weights of a device share, is left out."""
        tensors = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def operands(self) -> Operands:
        """The weight as the registered ops take it."""
        return self.codes, self.absmax, self.nested_absmax, self.nested_map, self.offset, self.block_size

    def to(self, device: torch.device | str) -> NF4Weight:
        """Copy to another device; itself when it is there already."""
        device = torch.device(device)

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=move(self.nested_absmax),
            nested_map=move(self.nested_map),
            offset=move(self.offset),
        )

    def state_dict(self, prefix: str = "", name: str = "weight") -> dict[str, Tensor]:
        """Tensors under bitsandbytes' keys: ``weight``, ``weight.absmax`` and so on.

        Args:
            prefix: put before every key, with its final dot.
            name: of the parameter that is packed.
        """
        facts: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {
            "": self.codes,
            ".absmax": self.absmax,
            ".quant_map": torch.tensor(native.nf4_levels(), device=self.device),
        }
        if self.nested_absmax is not None and self.nested_map is not None and self.offset is not None:
            facts["nested_blocksize"] = NESTED_BLOCK_SIZE
            facts["nested_dtype"] = "float32"
            facts["nested_offset"] = self.offset.item()
            tensors[".nested_absmax"] = self.nested_absmax
            # A copy, because safetensors refuses tensors that share memory.
            tensors[".nested_quant_map"] = self.nested_map.clone()
        tensors["." + STATE_KEY] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        return {f"{prefix}{name}{key}": tensor for key, tensor in tensors.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "", name: str = "weight") -> NF4Weight:
        """Read a weight from tensors stored by :meth:`state_dict` or by bitsandbytes.

        Args:
            state: tensors by key; codes may be stored as bfloat16, float16 or float32 (same bytes).
            prefix: what stands before the name, with its final dot.
            name: of the parameter that is packed.
        Raises:
            ValueError: a key is missing, the type is not nf4, or sizes do not fit the recorded shape.
        """
        full_name = prefix + name

        def get(key: str) -> Tensor:
            stored = full_name + key
            if stored not in state:
                raise ValueError(
                    f"NF4Weight.from_state_dict: no tensor {stored!r}; the keys of an NF4 weight are needed"
                )
            return state[stored]

        facts = json.loads(bytes(get("." + STATE_KEY).cpu().tolist()))
        if facts["quant_type"] != "nf4":
            raise ValueError(f"NF4Weight.from_state_dict: {full_name} is of type {facts['quant_type']!r}, not 'nf4'")
        codes = get("").contiguous().view(torch.uint8).reshape(-1, 1)
        nested = "nested_blocksize" in facts
        if nested and facts["nested_blocksize"] != NESTED_BLOCK_SIZE:
            raise ValueError(
                f"NF4Weight.from_state_dict: {full_name} has nested blocks of {facts['nested_blocksize']}; "
                f"only {NESTED_BLOCK_SIZE} is supported"
            )
        return cls(
            codes=codes,
            absmax=get(".absmax"),
            nested_absmax=get(".nested_absmax") if nested else None,
            nested_map=get(".nested_quant_map") if nested else None,
            offset=torch.tensor(facts["nested_offset"], device=codes.device) if nested else None,
            shape=tuple(facts["shape"]),
            block_size=facts["blocksize"],
            dtype=getattr(torch, facts["dtype"]),
        )


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic map: 256 values from about -0.993 to 1, dense near zero; one tensor a device.

    Source:
        8-bit optimizers via block-wise quantization, arXiv 2110.02861, section 1.3.
    """
    return torch.tensor(native.dynamic_map(signed=True), dtype=torch.float32, device=device)
