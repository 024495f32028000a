"""Learning from preferences as one function each: a reward model, DPO, and PPO."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.data import (
    build_preference_dataset,
    build_prompt_dataset,
    cached_preference_dataset,
    cached_prompt_dataset,
)
from fastpeft.errors import UserError
from fastpeft.methods import FullConfig, PeftModel, get_peft_model
from fastpeft.recipes.job import Job, new_adapter, run_job
from fastpeft.recipes.schema import RunConfig
from fastpeft.recipes.sft import run_sft
from fastpeft.trainers import (
    BaseTrainer,
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardTrainer,
    attach_score,
    get_reward_model,
)
from fastpeft.trainers.forward import SCORE

_REFERENCE, _REWARD = "reference", "reward"  # adapters of these roles beside "default"

Say = Callable[[str], None] | None


def run_reward(config: RunConfig, say: Say = None) -> Path:
    """Train a reward model on pairs and rankings; see `fastpeft.recipes.job.run_job`.

    Args:
        config: what ``load_config(..., kind="reward")`` read.
        say: called with lines about what is going on.
    Returns:
        The run folder; its ``adapter/`` holds the score layer too, and is what ``reward.adapter`` of PPO takes.
    """
    _pad_after_virtual_tokens(config)

    def adapt(model: nn.Module, config: RunConfig) -> nn.Module:
        seed, method = config.train.args.seed, config.peft.config
        if isinstance(method, FullConfig):
            return get_peft_model(attach_score(model, seed), _with_score(method))
        return get_reward_model(model, method, seed)  # type: ignore[arg-type]  # any with modules_to_save

    return run_job(
        config, Job(build_preference_dataset, cached_preference_dataset, RewardTrainer, adapt, _check_reward), say
    )


def run_dpo(config: RunConfig, say: Say = None) -> Path:
    """Learn from pairs by direct preference optimisation; see `fastpeft.recipes.job.run_job`.

    Args:
        config: what ``load_config(..., kind="dpo")`` read.
        say: called with lines about what is going on.
    Returns:
        The run folder.
    """
    args: Any = config.train.args
    _refer_to(config, args)
    _pad_after_virtual_tokens(config)

    def trainer(model: nn.Module, **given: Any) -> BaseTrainer:
        return DPOTrainer(model, **given)

    return run_job(
        config, Job(build_preference_dataset, cached_preference_dataset, trainer, _with_reference, _check_dpo), say
    )


def run_ppo(config: RunConfig, say: Say = None) -> Path:
    """Learn from scores of what the policy says, by PPO or GRPO; see `fastpeft.recipes.job.run_job`.

    Args:
        config: what ``load_config(..., kind="ppo")`` read.
        say: called with lines about what is going on.
    Returns:
        The run folder, with ``completions.jsonl`` beside the rest.
    """
    args: Any = config.train.args
    _refer_to(config, args)
    if config.reward.adapter is not None:
        args.reward_adapter_name = _REWARD
    functions = [] if config.reward.function is None else [load_function(config)]

    def adapt(model: nn.Module, config: RunConfig) -> nn.Module:
        adapted = _with_reference(model, config)
        if config.reward.adapter is not None and isinstance(adapted, PeftModel):
            attach_score(adapted)
            adapted.load_adapter(config.reward.adapter, _REWARD)
        return adapted

    trainer = functools.partial(PPOTrainer, reward_funcs=functions)
    return run_job(config, Job(build_prompt_dataset, cached_prompt_dataset, trainer, adapt, _check_ppo), say)


def run_config(config: RunConfig, say: Say = None) -> Path:
    """Run whichever kind a configuration is of.

    Args:
        config: a checked configuration.
        say: called with lines about what is going on.
    Returns:
        The run folder.
    """
    run = {"sft": run_sft, "reward": run_reward, "dpo": run_dpo, "ppo": run_ppo}[config.kind]
    return run(config, say)


def load_function(config: RunConfig) -> Callable[..., Any]:
    """The reward function that the settings name; its file is run.

    Args:
        config: the run's.
    Raises:
        UserError: the file cannot be run, or has no function of that name.
    """
    assert config.reward.function is not None
    where = config.settings.origin("reward", "function")
    path, _, name = config.reward.function.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{where}: reward.function: {path} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{where}: reward.function: {path} has no function {name}")
    return function  # type: ignore[no-any-return]


def _refer_to(config: RunConfig, args: Any) -> None:
    """An adapter to go on from is loaded twice: to be trained, and to be what the policy is held to."""
    if config.peft.adapter is not None:
        args.ref_adapter_name = _REFERENCE


def _with_reference(model: nn.Module, config: RunConfig) -> nn.Module:
    if config.peft.adapter is None:
        return new_adapter(model, config)
    adapted = PeftModel.from_pretrained(model, config.peft.adapter, is_trainable=True)
    adapted.load_adapter(config.peft.adapter, _REFERENCE)
    return adapted


def _with_score(config: FullConfig) -> FullConfig:
    """Let the score layer train beside the weights that were chosen."""
    if config.train is None:
        return config
    pattern = rf"(?:{config.train})|{SCORE}\..*" if isinstance(config.train, str) else [*config.train, SCORE]
    return dataclasses.replace(config, train=pattern)


def _pad_after_virtual_tokens(config: RunConfig) -> None:
    """Virtual tokens stand before each row of a batch, so every answer needs a row of its own.

    Raises:
        UserError: the settings ask for another layout.
    """
    args: Any = config.train.args
    if not config.peft.virtual_tokens:
        return
    if args.layout not in ("auto", "padded"):
        raise UserError(
            f"{config.settings.origin('train', 'layout')}: train.layout is {args.layout!r}, and the virtual tokens of "
            f"peft.method {config.peft.method} stand before every row; use padded"
        )
    args.layout = "padded"


def _check_score(config: RunConfig, role: str) -> None:
    if config.peft.method == "adapter":
        raise UserError(
            f"{config.settings.origin('peft', 'method')}: peft.method adapter keeps no copy of the score layer that "
            f"{role} needs; use peft.method lora, ia3, prompt_tuning or p_tuning"
        )


def _check_reward(config: RunConfig) -> None:
    _check_score(config, "a reward model")


def _check_dpo(config: RunConfig) -> None:
    args = config.train.args
    assert isinstance(args, DPOConfig)
    if config.peft.trains_whole_model and not args.precompute_ref_log_probs:
        raise UserError(
            f"{config.settings.origin('peft', 'method')}: peft.method {config.peft.method} trains the model's own "
            "weights, so that it cannot be its own reference; set train.precompute_ref_log_probs: true, or use "
            "peft.method lora"
        )


def _check_ppo(config: RunConfig) -> None:
    args = config.train.args
    assert isinstance(args, PPOConfig)
    if args.advantage == "gae":
        _check_score(config, "the value head (train.advantage gae)")
    if config.peft.virtual_tokens and args.num_generations > 1:
        raise UserError(
            f"{config.settings.origin('train', 'num_generations')}: train.num_generations is {args.num_generations}, "
            f"whose answers share the row of their prompt, and the virtual tokens of peft.method {config.peft.method} "
            "need a row each; set it to 1, or use peft.method lora"
        )
    if config.peft.trains_whole_model:
        raise UserError(
            f"{config.settings.origin('peft', 'method')}: fastpeft ppo trains an adapter, so that the model without it "
            "is the reference; use peft.method lora (in Python, PPOTrainer takes a whole model and ref_model=)"
        )
