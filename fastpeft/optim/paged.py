"""AdamW and AdamW8bit whose state moves to host memory where the GPU has no room for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastpeft.optim.adamw8bit import MIN_8BIT_SIZE
from fastpeft.optim.options import check_bytes
from fastpeft.optim.paged_state import PagedState

RESERVE_BYTES = 1 << 30


class PagedAdamW(PagedState):
    """`AdamW` whose state lies on the GPU as far as there is room for it, and in host memory beyond that.

    What is on the host is streamed through the GPU at each step, at the speed of the link, while what is on the GPU
    steps beside it. Where it lies changes no bit of the result. State dicts are those of `AdamW`, on the CPU. For
    parameters on the CPU it is `AdamW`.

    Args:
        params: as for `AdamW`.
        lr: learning rate: a number or a tensor of one element.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        amsgrad: must be False.
        maximize: ascend instead of descend.
        foreach: changes nothing; there is one implementation.
        capturable: changes nothing; steps can be captured while all state is on the GPU.
        differentiable: must be False.
        fused: changes nothing; it always is.
        stochastic_rounding: as for `AdamW`.
        max_grad_norm: as for `AdamW`.
        seed: of the random rounding.
        device_budget_bytes: state that may be on each GPU; None for all that it has room for. The attribute can be
            changed at any time, for the steps that follow.
        reserve_bytes: memory of the GPU that state does not come to, for the rest of the program.
        pinned: hold all state in pinned host memory, with room on the GPU for what is there: stepped as the link goes.
            False: in unified memory, of which the host keeps no second copy, at a quarter of that speed.
    Raises:
        ValueError: as for `AdamW`, and for a negative budget or reserve.
    Source:
        QLoRA, arXiv 2305.14314, section 3.
    """

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
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
        device_budget_bytes: int | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        pinned: bool = True,
    ) -> None:
        check_bytes(type(self).__name__, device_budget_bytes=device_budget_bytes, reserve_bytes=reserve_bytes)
        self.device_budget_bytes, self.reserve_bytes = device_budget_bytes, reserve_bytes
        self._mode = "pinned" if pinned else "managed"
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize},
            amsgrad=amsgrad,
            differentiable=differentiable,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )


class PagedAdamW8bit(PagedAdamW):
    """`AdamW8bit` with the paging of `PagedAdamW`; parameters too small for 8-bit state keep theirs on the GPU.

    Args:
        params: as for `AdamW`.
        lr: learning rate: a number or a tensor of one element.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        amsgrad: must be False.
        min_8bit_size: parameters with fewer elements keep float32 state.
        options: the keywords of `PagedAdamW`.
    Raises:
        ValueError: as for `PagedAdamW`.
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
        min_8bit_size: int = MIN_8BIT_SIZE,
        **options: Any,
    ) -> None:
        self._min_8bit_size = min_8bit_size
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
