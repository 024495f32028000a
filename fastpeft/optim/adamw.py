"""AdamW with float32 state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastpeft.optim.resident import ResidentState


class AdamW(ResidentState):
    """AdamW as ``torch.optim.AdamW``, with moments in float32 whatever the parameter's dtype.

    All parameters of a group step in one launch. Nothing waits for the device, and after a first step nothing is
    allocated, so that further ones can be captured into a CUDA graph; a learning rate that is a tensor on the device is
    read at each replay. State dicts go to and come from ``torch.optim.AdamW``.

    Args:
        params: tensors, named tensors (`Module.named_parameters`, whose names messages then use), or groups of them:
            float32, float16 or bfloat16, contiguous; DTensors are stepped by their local parts.
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
        stochastic_rounding: round bfloat16 parameters up or down with the probability of the distances, so that updates
            below their resolution are not lost; the same bits for the same seed and step.
        max_grad_norm: scale gradients down to this norm of all of them together, as
            ``torch.nn.utils.clip_grad_norm_`` does, without waiting for the device. A step whose norm is not finite
            changes nothing and is counted in `skipped_steps`.
        seed: of the random rounding.
    Raises:
        ValueError: a value out of range, or a parameter that is sparse, float64 or not contiguous.
    Source:
        Decoupled weight decay regularization, arXiv 1711.05101.
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
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize},
            amsgrad=amsgrad,
            differentiable=differentiable,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
