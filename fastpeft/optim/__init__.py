"""Optimizers."""

from fastpeft.optim.adamw import AdamW
from fastpeft.optim.adamw8bit import AdamW8bit
from fastpeft.optim.paged import PagedAdamW, PagedAdamW8bit

__all__ = ["AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit"]
