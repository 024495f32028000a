"""Trainers on top of ``transformers.Trainer``: safe steps, whole checkpoints, metrics and progress."""

from fastpeft.trainers.base import BaseTrainer
from fastpeft.trainers.config import BaseConfig
from fastpeft.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["BaseConfig", "BaseTrainer", "SFTConfig", "SFTTrainer"]
