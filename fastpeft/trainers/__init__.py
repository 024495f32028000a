"""Trainers on top of ``transformers.Trainer``: safe steps, whole checkpoints, metrics and progress."""

from fastpeft.trainers.base import BaseTrainer
from fastpeft.trainers.config import BaseConfig
from fastpeft.trainers.dpo import DPOConfig, DPOTrainer
from fastpeft.trainers.heads import attach_score, get_reward_model
from fastpeft.trainers.ppo import PPOTrainer
from fastpeft.trainers.ppo_config import PPOConfig
from fastpeft.trainers.reward import RewardConfig, RewardTrainer
from fastpeft.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "DPOConfig",
    "DPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "attach_score",
    "get_reward_model",
]
