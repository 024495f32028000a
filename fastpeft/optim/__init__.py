"""Optimizers."""

from fastpeft.optim.adamw import AdamW

__all__ = ["AdamW"]
