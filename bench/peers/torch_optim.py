"""torch.optim.AdamW, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def adamw(params: Sequence[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
    """AdamW with one fused kernel a step; its state has the parameters' dtype."""
    return torch.optim.AdamW(list(params), fused=True, **hyper)


def adamw_for_graphs(params: Sequence[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
    """The same with its step counts on the device, as capturing wants them."""
    return torch.optim.AdamW(list(params), fused=True, capturable=True, **hyper)
