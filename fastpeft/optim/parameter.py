"""What an optimizer knows of a parameter from the moment it is given it, and what must still hold at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft.optim.formats import local

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Entry:
    """A parameter in its optimizer.

    Attributes:
        param: as it was given; may be a DTensor.
        local: this process's part of it, the tensor that is stepped.
        address: of its first element when it was last looked at.
        dtype: as it was when it was given.
        device: as it was then.
        shape: of ``local``, as it was then.
        options: its group.
        group: number of its group.
        index: its place in the group.
        number: its place among all parameters of the optimizer.
    """

    param: Tensor
    local: Tensor
    address: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    options: Mapping[str, Any]
    group: int
    index: int
    number: int

    @property
    def name(self) -> str:
        """As messages name it."""
        return describe(self.options, self.group, self.index)

    @property
    def distributed(self) -> bool:
        """Whether this process has a part of it alone."""
        return self.local is not self.param

    @property
    def gradient(self) -> Tensor | None:
        """This process's part of the gradient, with the placement of the parameter."""
        grad = self.param.grad
        if grad is None or not self.distributed:
            return grad
        if hasattr(grad, "redistribute") and grad.placements != self.param.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=self.param.placements)  # type: ignore[attr-defined]
        part: Tensor = local(grad)
        return part


def describe(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """Name a parameter: as the user did, or by its place and shape."""
    names = group.get("param_names")
    if names:
        return str(names[index])
    return f"parameter {index} of group {group_index} (shape {tuple(group['params'][index].shape)})"


def make_entry(optimizer: str, group: Mapping[str, Any], group_index: int, index: int, number: int) -> Entry:
    """Check a parameter and note where it lies.

    Raises:
        ValueError: it has a dtype, layout or strides that no kernel takes.
    """
    param = group["params"][index]
    name = describe(group, group_index, index)
    if param.layout != torch.strided:
        raise ValueError(f"{optimizer}: {name} is sparse ({param.layout}); only dense parameters are supported")
    if param.dtype not in _DTYPES:
        raise ValueError(f"{optimizer}: {name} is {param.dtype}; it must be float32, float16 or bfloat16")
    part = local(param)
    if not part.is_contiguous():
        raise ValueError(
            f"{optimizer}: {name} is not contiguous (strides {part.stride()}); make it so before it is given to the "
            "optimizer: param.data = param.data.contiguous()"
        )
    place = part.data_ptr(), part.dtype, part.device, part.shape
    return Entry(param, part, *place, group, group_index, index, number)


def follow(optimizer: str, entry: Entry) -> bool:
    """Find a parameter that is to be stepped; it may lie elsewhere than before, as cuDNN's recurrent layers put theirs
    together whenever a model is sent to a device.

    Returns:
        Whether it was moved.
    Raises:
        ValueError: it is on another device, or was cast or reshaped; the state would not fit it.
    """
    now = local(entry.param)
    was, is_now = (entry.dtype, entry.device, entry.shape), (now.dtype, now.device, now.shape)
    if was != is_now or not now.is_contiguous():
        one, other = (f"{dtype} of shape {tuple(shape)} on {device}" for dtype, device, shape in (was, is_now))
        how = f"it was {one} and is {other}" if was != is_now else f"it is not contiguous (strides {now.stride()})"
        raise ValueError(
            f"{optimizer}: {entry.name} was changed after the optimizer was made: {how}; move or cast the model first, "
            "then make the optimizer. Nothing was updated"
        )
    if now.data_ptr() == entry.address:
        return False
    entry.local, entry.address = now, now.data_ptr()
    return True


def check_gradient(optimizer: str, entry: Entry, grad: Tensor) -> None:
    """Refuse a gradient that no kernel takes.

    Raises:
        ValueError: it is sparse, or of another device, shape or dtype than it must be.
    """
    told = f"{optimizer}: the gradient of {entry.name}"
    if grad.layout != torch.strided:
        raise ValueError(f"{told} is sparse ({grad.layout}); use dense ones (nn.Embedding(sparse=False))")
    if grad.device != entry.device:
        raise ValueError(f"{told} is on {grad.device} and the parameter on {entry.device}")
    if grad.shape != entry.shape:
        raise ValueError(f"{told} has shape {tuple(grad.shape)} and the parameter {tuple(entry.shape)}")
    if grad.dtype not in _DTYPES:
        raise ValueError(f"{told} is {grad.dtype}; it must be float32, float16 or bfloat16")
