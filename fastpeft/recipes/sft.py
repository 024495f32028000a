"""Supervised fine-tuning as one function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastpeft.data import build_sft_dataset, cached_sft_dataset
from fastpeft.recipes.job import Job, run_job
from fastpeft.recipes.schema import RunConfig
from fastpeft.trainers import SFTTrainer


def run_sft(config: RunConfig, say: Callable[[str], None] | None = None) -> Path:
    """Fine-tune as the configuration says; see `fastpeft.recipes.job.run_job`.

    Args:
        config: what ``load_config`` read.
        say: called with lines about what is going on, by the first process only; None prints them.
    Returns:
        The run folder.
    Raises:
        UserError: something in the settings, the data or the model folder is wrong.
    """
    return run_job(config, Job(build_sft_dataset, cached_sft_dataset, SFTTrainer), say)
