"""AdamW with 8-bit state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastpeft.optim.resident import ResidentState

MIN_8BIT_SIZE = 4096  # as in bitsandbytes


class AdamW8bit(ResidentState):
    """AdamW whose moments are 8-bit codes with a scale for each 256 elements: 2.03 bytes a parameter instead of 8.

    Codes are those of bitsandbytes' dynamic map, and state dicts go to and come from ``bitsandbytes.optim.AdamW8bit``;
    those of 32-bit optimizers are read too.

    Args:
        params: as for `AdamW`.
        lr: learning rate: a number or a tensor of one element.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        amsgrad: must be False.
        maximize: ascend instead of descend.
        foreach: changes nothing; there is one implementation.
        capturable: changes nothing; it always is.
        differentiable: must be False.
        fused: changes nothing; it always is.
        min_8bit_size: parameters with fewer elements keep float32 state.
        stochastic_rounding: as for `AdamW`.
        max_grad_norm: as for `AdamW`.
        seed: of the random rounding.
    Raises:
        ValueError: as for `AdamW`.
    Source:
        8-bit optimizers via block-wise quantization, arXiv 2110.02861.
    """

    _bitsandbytes_names = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self._min_8bit_size = min_8bit_size
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize},
            amsgrad=amsgrad,
            differentiable=differentiable,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
