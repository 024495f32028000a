"""Supervised fine-tuning as one function: a checked configuration in, a run folder out.

The order is the point. Settings, data, tokenizer, and the adapter on a skeleton without weights are checked first, so
that a mistake shows in seconds and leaves nothing behind; then the weights are read, and the run folder is made last.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from torch import nn

from fastpeft.data import SFTDataset, build_sft_dataset
from fastpeft.errors import UserError
from fastpeft.methods import get_peft_model
from fastpeft.methods.inject import plan_adapter
from fastpeft.recipes.load import check_device, load_tokenizer, load_weights, model_skeleton, read_config
from fastpeft.recipes.plot import METRICS_FILE, PLOT_FILE, plot_run
from fastpeft.recipes.schema import RunConfig
from fastpeft.trainers import SFTTrainer

CONFIG_FILE = "config.yaml"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
_CHECKPOINTS = "checkpoint-*"


def run_sft(config: RunConfig, say: Callable[[str], None] | None = None) -> Path:
    """Fine-tune as the configuration says.

    Args:
        config: what ``load_config`` read.
        say: called with lines about what is going on, by the first process only; None prints them.
    Returns:
        The run folder: ``config.yaml``, ``metrics.jsonl``, ``checkpoint-N/``, ``loss.png`` (with matplotlib), and
        ``adapter/`` in PEFT's layout, or ``model/`` after training all weights.
    Raises:
        UserError: something in the settings, the data or the model folder is wrong; the run folder is untouched then.
    """
    args = config.train.args
    is_first = args.process_index == 0
    say = (say or _print_now) if is_first else _say_nothing
    check_device(args.device)
    resume = _can_resume(config)
    if config.train.resume and not resume:
        say(f"no checkpoint in {config.output_dir} to resume from; starting at the beginning")

    tokenizer = load_tokenizer(config.model)
    train_rows = _dataset(config, "train", tokenizer)
    eval_rows = _dataset(config, "eval", tokenizer) if config.data.eval is not None else None
    for rows in (train_rows, eval_rows):
        if rows is not None:
            say(rows.report.summary())
    base_config = read_config(config.model)
    with _complaints_name_lines(config):
        if config.peft.lora is not None:
            plan_adapter(model_skeleton(base_config), config.peft.lora)

    say(f"loading {config.model.path}")
    base = load_weights(config.model, base_config, tokenizer, args.device)
    transformers.set_seed(args.seed)  # the adapter's first values
    with _complaints_name_lines(config):
        model = base if config.peft.lora is None else get_peft_model(base, config.peft.lora)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training {trainable:,} parameters on {args.device}")

    if is_first:
        _prepare_folder(config, resume)
    trainer = SFTTrainer(model, args=args, train_dataset=train_rows, eval_dataset=eval_rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)

    if is_first:
        name = ADAPTER_FOLDER if config.peft.lora is not None else MODEL_FOLDER
        saved = _save(model, config.output_dir / name)
        if config.peft.lora is None:
            tokenizer.save_pretrained(saved)
        say(f"saved {saved}")
        try:
            say(f"loss curve: {plot_run(config.output_dir)}")
        except UserError as error:  # no matplotlib, or nothing was logged: the training stands
            say(f"no loss curve: {error}")
    return config.output_dir


def _print_now(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    """What processes other than the first have to say."""


def _dataset(config: RunConfig, key: str, tokenizer: transformers.PreTrainedTokenizerBase) -> SFTDataset:
    # Messages name the file as the user wrote it.
    return build_sft_dataset(
        getattr(config.data, key),
        tokenizer,
        max_length=config.data.max_length,
        on_bad_row=config.data.on_bad_row,
        name=str(config.settings.values["data"][key]),
    )


@contextmanager
def _complaints_name_lines(config: RunConfig) -> Iterator[None]:
    """Put the line of the ``peft`` key before a complaint about the adapter; it begins with the key."""
    try:
        yield
    except UserError as error:
        key = re.split(r"\W", str(error), maxsplit=1)[0]
        raise UserError(f"{config.settings.origin('peft', key)}: peft.{error}") from error


def _can_resume(config: RunConfig) -> bool:
    """Whether to continue from a checkpoint; UserError where a run would be written over another."""
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{config.settings.origin('train', 'output_dir')}: train.output_dir {folder} is a file")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(
            f"{config.settings.origin('train', 'output_dir')}: train.output_dir: {there} cannot be written to"
        )
    if config.train.resume and any(folder.glob(_CHECKPOINTS)):
        return True
    kept = [path.name for path in _results(folder)]
    if kept and not config.train.overwrite:
        raise UserError(
            f"train.output_dir {folder} already holds a run ({', '.join(kept[:4])}{', ...' if len(kept) > 4 else ''}); "
            "continue it with train.resume=true, replace it with train.overwrite=true, or name another folder"
        )
    return False


def _results(folder: Path) -> list[Path]:
    """What of an earlier run is worth keeping."""
    named = [folder / name for name in (ADAPTER_FOLDER, MODEL_FOLDER)]
    return [path for path in (*named, *sorted(folder.glob(_CHECKPOINTS))) if path.exists()]


def _prepare_folder(config: RunConfig, resume: bool) -> None:
    """Make the run folder, empty it of an earlier run unless that is continued, and note the settings."""
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        for path in _results(folder):
            shutil.rmtree(path)
        for name in (METRICS_FILE, PLOT_FILE):
            (folder / name).unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")


def _save(model: nn.Module, folder: Path) -> Path:
    """Save under another name and rename, so that a folder of this name is always complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial))  # type: ignore[operator]  # both kinds of model have it
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder
