"""What an AdamW can be told, checked when it is told and again at each step, as schedulers write into groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_arguments(optimizer: str, amsgrad: bool, differentiable: bool, max_grad_norm: float | None) -> None:
    """Refuse arguments that this family does not do.

    Args:
        optimizer: name of the class, for messages.
        amsgrad: as in torch.
        differentiable: as in torch.
        max_grad_norm: norm to clip at, or None.
    Raises:
        ValueError: one of them is asked for, or the norm is not above 0.
    """
    if amsgrad:
        raise ValueError(
            f"{optimizer}: amsgrad is True; the maximum of second moments is not kept here; leave it out, or use "
            "torch.optim.AdamW(amsgrad=True)"
        )
    if differentiable:
        raise ValueError(
            f"{optimizer}: differentiable is True; the update is one kernel that autograd does not see; use "
            "torch.optim.AdamW(differentiable=True)"
        )
    if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"{optimizer}: max_grad_norm is {max_grad_norm}; it must be above 0, or None for no clipping")


def check_group(optimizer: str, group: Mapping[str, Any], index: int | None = None) -> None:
    """Refuse options of a parameter group that are out of range.

    Args:
        optimizer: name of the class, for messages.
        group: the group, or the defaults of all.
        index: number of the group; None for the defaults.
    Raises:
        ValueError: names the option, its value and the group.
    """
    where = "" if index is None else f" in parameter group {index}"
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"{optimizer}: lr{where} is a {lr.dtype} tensor of shape {tuple(lr.shape)}; it must be a number or a "
                "tensor of one floating-point element"
            )
        if lr.device.type == "cpu":
            lr = float(lr)
    if not isinstance(lr, Tensor):
        _check_range(optimizer, "lr", lr, where)
    _check_range(optimizer, "eps", group["eps"], where)
    _check_range(optimizer, "weight_decay", group["weight_decay"], where)
    betas = group["betas"]
    if len(betas) != 2 or not all(_is_number(beta) and 0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"{optimizer}: betas{where} are {tuple(betas)}; both must be at least 0 and below 1")
    if group.get("amsgrad"):
        raise ValueError(f"{optimizer}: amsgrad{where} is True; the maximum of second moments is not kept here")


def check_bytes(optimizer: str, **values: int | None) -> None:
    """Refuse amounts of memory that are none.

    Raises:
        ValueError: one is negative or no number.
    """
    for name, value in values.items():
        if value is not None and not (_is_number(value) and value >= 0):
            raise ValueError(f"{optimizer}: {name} is {value}; it must be a number of bytes, 0 or more")


def rate(group: Mapping[str, Any], device: torch.device) -> float | Tensor:
    """The learning rate of a group as a kernel takes it: a number, or a float32 scalar on the device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return float(lr)
    return lr.detach().reshape(()).to(device=device, dtype=torch.float32)


def _check_range(optimizer: str, name: str, value: Any, where: str) -> None:
    if not _is_number(value) or not 0.0 <= float(value) < math.inf:
        raise ValueError(f"{optimizer}: {name}{where} is {value}; it must be 0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu")
