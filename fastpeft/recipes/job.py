"""A run as one function: a checked configuration in, a run folder out; what is trained, and how, is a `Job`.

The order is the point. Settings, data, tokenizer, and the adapter on a skeleton without weights are checked first, so
that a mistake shows in seconds and leaves nothing behind; then the weights are read. The run folder changes last, when
the trainer stands at its first step (`run_folder`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from torch import nn

from fastpeft.data import MixedDataset, leak_warning, split_dataset
from fastpeft.errors import UserError
from fastpeft.methods import AdapterConfig, FullConfig, get_peft_model
from fastpeft.methods.inject import plan_adapter
from fastpeft.models import accelerate, report
from fastpeft.recipes.estimate_report import predicted_and_measured
from fastpeft.recipes.load import check_device, load_tokenizer, load_weights, model_skeleton, read_config
from fastpeft.recipes.plot import plot_run
from fastpeft.recipes.run_folder import (
    BeginRunFolder,
    check_run_folder,
    no_empty_folders_left,
    result_folder,
    save_result,
)
from fastpeft.recipes.schema import RunConfig
from fastpeft.trainers import BaseTrainer
from fastpeft.trainers.metrics import append_metrics

_SHORTEST = 8  # tokens of text beside virtual ones, as the trainers have it


def new_adapter(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model with the adapter that the configuration describes, or as it is where there is none."""
    return model if config.peft.config is None else get_peft_model(model, config.peft.config)


def check_adapter(skeleton: nn.Module, config: AdapterConfig) -> None:
    """Raise UserError unless a method fits a model of these modules.

    Args:
        skeleton: what ``model_skeleton`` gave; changed where the method trains the model's own weights.
        config: the method's.
    """
    if isinstance(config, FullConfig):
        get_peft_model(skeleton, config)
    else:
        plan_adapter(skeleton, config)


@dataclass(frozen=True)
class Job:
    """What one kind of run does differently from another.

    Args:
        build_dataset: makes a data set of a file, the tokenizer, ``max_length``, ``on_bad_row`` and ``name``; it has a
            ``report``.
        cached_dataset: the same from a cache, ``cache_dir``.
        trainer: makes the trainer of a model and of transformers' arguments.
        adapt: puts the adapters into the model.
        check: looks at the settings before anything is loaded.
    """

    build_dataset: Callable[..., Any]
    cached_dataset: Callable[..., Any]
    trainer: Callable[..., BaseTrainer]
    adapt: Callable[[nn.Module, RunConfig], nn.Module] = new_adapter
    check: Callable[[RunConfig], None] = lambda config: None


def run_job(config: RunConfig, job: Job, say: Callable[[str], None] | None = None) -> Path:
    """Train as the configuration says.

    Args:
        config: what ``load_config`` read.
        job: which kind of run.
        say: called with lines about what is going on, by the first process only; None prints them.
    Returns:
        The run folder: ``config.yaml``, ``metrics.jsonl``, ``checkpoint-N/``, ``loss.png`` (with matplotlib), and
        ``adapter/`` in PEFT's layout, or ``model/`` after training the model's own weights.
    Raises:
        UserError: something in the settings, the data or the model folder is wrong, or the checkpoint to resume from
            cannot be used; the run folder is as it was then.
    """
    args = config.train.args
    is_first = args.process_index == 0
    say = (say or _print_now) if is_first else _say_nothing
    check_device(args.device)
    job.check(config)
    resume = check_run_folder(config)
    if config.train.resume and not resume:
        say(f"no checkpoint in {config.output_dir} to resume from; starting at the beginning")

    with _complaints_name_lines(config, "model"):
        tokenizer = load_tokenizer(config.model)
    train_rows = _dataset(config, job, "train", tokenizer)
    eval_rows = _dataset(config, job, "eval", tokenizer) if config.data.eval is not None else None
    for rows in (train_rows, eval_rows):
        if rows is not None:
            say(rows.report.summary())
    if config.data.eval_fraction is not None:
        split = split_dataset(train_rows, config.data.eval_fraction, args.seed)
        train_rows, eval_rows = split.train, split.held_out
        say(split.summary())
    elif eval_rows is not None and (warning := leak_warning(train_rows, eval_rows)):
        say(warning)
    with _complaints_name_lines(config, "model"):
        base_config = read_config(config.model)
    with _complaints_name_lines(config, "peft"):
        if config.peft.config is not None:
            check_adapter(model_skeleton(base_config), config.peft.config)

    say(f"loading {config.model.path}")
    with _complaints_name_lines(config, "model"):
        base = load_weights(config.model, base_config, tokenizer, args.device)
    if config.model.accelerates(args.device):
        options = config.model.checkpointing, config.model.activation_budget_gb
        accelerate(base, checkpointing=options[0], activation_budget_gb=options[1])
        say(str(report(base)))
    transformers.set_seed(args.seed)  # the adapter's first values
    with _complaints_name_lines(config, "peft"):
        model = job.adapt(base, config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training {trainable:,} parameters on {args.device}")

    with no_empty_folders_left(config.output_dir):
        trainer = job.trainer(
            model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=[BeginRunFolder(config, resume)],
        )
        trainer.train(resume_from_checkpoint=resume)

    saved = result_folder(config)
    if is_first and not (trainer.nothing_to_do and saved.exists()):
        save_result(model, tokenizer if config.peft.trains_whole_model else None, saved)
        say(f"saved {saved}")
        _compare_memory(config, trainer, say)
        try:
            say(f"loss curve: {plot_run(config.output_dir)}")
        except UserError as error:  # no matplotlib, or nothing was logged: the training stands
            say(f"no loss curve: {error}")
    return config.output_dir


def _compare_memory(config: RunConfig, trainer: BaseTrainer, say: Callable[[str], None]) -> None:
    """Say what `estimate` predicts of the training that is over and what it took, and note both with its metrics."""
    measured = trainer.peak_memory()
    if measured is None or trainer.nothing_to_do:
        return
    found = predicted_and_measured(config, trainer.largest_batch, measured)
    if found is not None:
        predicted, line = found
        say(line)
        values = {"predicted_memory_bytes": predicted, "measured_memory_bytes": measured}
        append_metrics(config.output_dir, trainer.state.global_step, values)


def _print_now(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    """What processes other than the first have to say."""


def _dataset(config: RunConfig, job: Job, key: str, tokenizer: transformers.PreTrainedTokenizerBase) -> Any:
    room = config.text_length
    if room < _SHORTEST:
        raise UserError(
            f"{config.settings.origin('data', 'max_length')}: data.max_length is {config.data.max_length}, and the "
            f"{config.peft.virtual_tokens} virtual tokens of peft.num_virtual_tokens leave {room} for the text; it "
            f"needs {_SHORTEST} or more"
        )
    options: dict[str, Any] = {"max_length": room, "on_bad_row": config.data.on_bad_row}
    if config.data.template is not None:
        options["template"] = config.data.template
    build = functools.partial(job.build_dataset, **options)
    if config.data.cache_dir is not None:
        build = functools.partial(job.cached_dataset, cache_dir=config.data.cache_dir, **options)
    source = getattr(config.data, key)
    if not isinstance(source, list):
        return build(source, tokenizer, name=str(config.settings.values["data"][key]))  # as the user wrote it
    parts = [build(path, tokenizer) for path, _ in config.data.train_files]
    shares = [weight for _, weight in config.data.train_files if weight is not None]
    return MixedDataset.by_shares(parts, shares, config.train.args.seed) if shares else MixedDataset(parts)


@contextmanager
def _complaints_name_lines(config: RunConfig, section: Literal["model", "peft"]) -> Iterator[None]:
    """Put the line of the key that a complaint is about before it.

    Those about the adapter begin with the key, those about the model with ``model.`` and the key, or name what failed.
    """
    try:
        yield
    except UserError as error:
        message = re.sub(r"^quantize: skip\b", "model.skip_modules", str(error))
        message = re.sub(r"^\w+Config: ", "", message)
        key = re.split(r"\W", message.removeprefix(f"{section}."), maxsplit=1)[0]
        if section == "peft":
            known = config.peft.config is not None and hasattr(config.peft.config, key)
            message = f"peft.{message}" if known else f"peft.method {config.peft.method}: {message}"
            key = key if known else "method"
        if section == "model" and key not in vars(config.model):
            key = "path"
        raise UserError(f"{config.settings.origin(section, key)}: {message}") from error
