"""One AdamW step over a list of tensors, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops import native


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
) -> None:
    if not params:
        return
    native.call(
        "adamw",
        params[0],
        [tensor.data_ptr() for tensor in params],
        [tensor.data_ptr() for tensor in grads],
        [tensor.data_ptr() for tensor in exp_avgs],
        [tensor.data_ptr() for tensor in exp_avg_sqs],
        [tensor.numel() for tensor in params],
        native.dtype_number("adamw", params[0].dtype),
        native.dtype_number("adamw", grads[0].dtype),
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        maximize,
    )


def _adamw_fake(params: list[Tensor], *rest: object) -> None:
    return None


native.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step, bool maximize) -> ()",
    _adamw,
    _adamw_fake,
)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
) -> None:
    """Update parameters and moments in place by one AdamW step.

    Args:
        params: contiguous tensors of one dtype (float32, float16 or bfloat16) on one device.
        grads: gradients of the same shapes, contiguous, of one dtype.
        exp_avgs: first moments, float32, of the same sizes.
        exp_avg_sqs: second moments, float32, of the same sizes.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by ``lr``.
        step: number of this step, from 1.
        maximize: ascend instead of descend.
    Raises:
        ValueError: lists of different lengths, tensors that are not contiguous, or mixed dtypes or devices.
    Source:
        Decoupled weight decay regularization, arXiv 1711.05101, algorithm 2.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError("adamw_: params, grads, exp_avgs and exp_avg_sqs must have the same length")
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if not param.numel() == grad.numel() == exp_avg.numel() == exp_avg_sq.numel():
            raise ValueError(
                f"adamw_: a parameter of shape {tuple(param.shape)} has a gradient of shape {tuple(grad.shape)} and "
                f"moments of shapes {tuple(exp_avg.shape)} and {tuple(exp_avg_sq.shape)}"
            )
        if not (param.is_contiguous() and grad.is_contiguous()):
            raise ValueError(f"adamw_: a parameter of shape {tuple(param.shape)} or its gradient is not contiguous")
        if param.dtype != params[0].dtype or grad.dtype != grads[0].dtype or param.device != params[0].device:
            raise ValueError("adamw_: all parameters must share dtype and device, and all gradients their dtype")
        if exp_avg.dtype != torch.float32 or exp_avg_sq.dtype != torch.float32:
            raise ValueError(f"adamw_: moments are {exp_avg.dtype} and {exp_avg_sq.dtype}; they must be float32")
    torch.ops.fastpeft.adamw_(params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, step, maximize)
