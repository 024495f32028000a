"""AdamW with float32 state, all parameters of a group in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import adamw_


class AdamW(torch.optim.Optimizer):
    """AdamW as ``torch.optim.AdamW``, with moments in float32 whatever the parameter's dtype.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        maximize: ascend instead of descend.
    Raises:
        ValueError: a value out of range, or sparse or float64 parameters.
    Source:
        Decoupled weight decay regularization, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0.0:
                raise ValueError(f"AdamW: {name} is {value}; it must be 0 or more")
        if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
            raise ValueError(f"AdamW: betas are {betas}; both must be at least 0 and below 1")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what ``closure`` returns, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (step, *_), params in self._batches(group).items():
                adamw_(
                    params,
                    [_gradient(param) for param in params],
                    [self.state[param]["exp_avg"] for param in params],
                    [self.state[param]["exp_avg_sq"] for param in params],
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                    maximize=group["maximize"],
                )
        return loss

    def _batches(self, group: dict[str, Any]) -> dict[tuple[Any, ...], list[Tensor]]:
        """Parameters that one launch can take together: same step, dtypes and device. Counts the step."""
        batches: dict[tuple[Any, ...], list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)
                state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            state["step"] = int(state["step"]) + 1
            key = (state["step"], param.dtype, param.grad.dtype, param.device)
            batches.setdefault(key, []).append(param)
        return batches

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state; moments stay float32 where torch would cast them to the parameter's dtype."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(indices, params, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                if key in saved.get(index, {}):
                    moment = saved[index][key].to(device=param.device, dtype=torch.float32, copy=True)
                    self.state[param][key] = moment.contiguous()


def _gradient(param: Tensor) -> Tensor:
    if param.grad is None:
        raise ValueError("AdamW: a parameter lost its gradient during the step")
    if param.grad.is_sparse:
        raise ValueError(f"AdamW: the gradient of a parameter of shape {tuple(param.shape)} is sparse; use dense ones")
    return param.grad.contiguous()
