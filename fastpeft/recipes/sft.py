"""Supervised fine-tuning as one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpeft.data import MixedDataset, build_sft_dataset, cached_sft_dataset
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
    one: Callable[..., Any] = build_sft_dataset
    if config.data.cache_dir is not None:
        one = functools.partial(cached_sft_dataset, cache_dir=config.data.cache_dir)

    def build(source: Any, tokenizer: Any, *, name: str, **options: Any) -> Any:
        if not isinstance(source, list):
            return one(source, tokenizer, name=name, **options)
        files = config.data.train_files
        parts = [one(path, tokenizer, **options) for path, _ in files]
        shares = [weight for _, weight in files if weight is not None]
        return MixedDataset.by_shares(parts, shares, config.train.args.seed) if shares else MixedDataset(parts)

    return run_job(config, Job(build, SFTTrainer), say)
