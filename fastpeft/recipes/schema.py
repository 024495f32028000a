"""The YAML of ``fastpeft sft | reward | dpo | ppo``, read and checked; `sections` says what it holds.

Everything here is checked without opening the model: keys, types, ranges, and whether the data files exist. Complaints
name the line, and come all at once where they do not hide each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastpeft.data import RowTemplate
from fastpeft.errors import UserError
from fastpeft.models.accelerate import check_checkpointing
from fastpeft.recipes.fields import hints_of, read_section, section_suggestion
from fastpeft.recipes.paths import RUN_FOLDER, resolve_adapters, resolve_output_dir, resolve_paths
from fastpeft.recipes.peft_section import key_of_another_method, peft_table, read_peft
from fastpeft.recipes.sections import (
    KINDS,
    RUN_MARK,
    START_KEYS,
    DataSection,
    ModelConfig,
    PeftSection,
    RewardSection,
    RunConfig,
    TrainSection,
)
from fastpeft.recipes.yaml_file import Settings, read_settings
from fastpeft.trainers import BaseConfig

__all__ = [
    "KINDS",
    "RUN_MARK",
    "DataSection",
    "ModelConfig",
    "PeftSection",
    "RewardSection",
    "RunConfig",
    "TrainSection",
    "check_settings",
    "load_config",
    "read_model_config",
    "read_row_template",
]

# Fields of TrainingArguments that only transformers' example scripts read.
_NO_TRAIN_KEYS = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint")
_TEMPLATES = ("prompt_template", "answer_template")
_FROM_ADAPTER = ("dpo", "ppo")  # kinds that can go on from an adapter


def load_config(path: str | Path, overrides: Iterable[str] = (), kind: str = "sft") -> RunConfig:
    """Read and check the YAML of a run.

    Args:
        path: the file. Paths in it are taken from the current folder, else from the file's.
        overrides: ``"a.b=c"``, applied in their order.
        kind: one of `KINDS`.
    Returns:
        The checked configuration. Nothing is written and no model is opened.
    Raises:
        UserError: unknown keys, values of the wrong type or range, missing keys, data files that do not exist.
    """
    return check_settings(read_settings(path, overrides), kind)


def section_tables(settings: Settings, kind: str) -> dict[str, dict[str, Any]]:
    """Keys and types of every section of a kind of run, with the method that the settings name.

    Args:
        settings: the run's; of them the method alone is looked at.
        kind: one of `KINDS`.
    """
    config_class, limit = KINDS[kind]
    elsewhere = {*hints_of(DataSection), *_NO_TRAIN_KEYS, limit}
    args_hints = {key: hint for key, hint in hints_of(config_class).items() if key not in elsewhere}
    return {
        "model": hints_of(ModelConfig),
        "peft": peft_table(settings, from_adapter=kind in _FROM_ADAPTER),
        "data": hints_of(DataSection),
        **({"reward": hints_of(RewardSection)} if kind == "ppo" else {}),
        "train": {**dict.fromkeys(START_KEYS, bool), **args_hints},
    }


def check_settings(settings: Settings, kind: str = "sft") -> RunConfig:
    """Check the settings of a run; `load_config` without the reading.

    Args:
        settings: nested values and where each was written.
        kind: one of `KINDS`.
    Returns:
        The checked configuration.
    Raises:
        UserError: as `load_config`.
    """
    tables = section_tables(settings, kind)
    problems = [
        f"{settings.origin(name)}: unknown key {name!r} at the top level{section_suggestion(name, tables)}"
        for name in settings.values
        if name not in tables
    ]
    homes = {"peft": key_of_another_method}
    read = {name: read_section(settings, name, tables, problems, homes.get(name, _nowhere)) for name in tables}
    model, peft, data, train = (read[name] for name in ("model", "peft", "data", "train"))
    reward = read.get("reward", {})
    for name, values, key, example in (
        ("model", model, "path", "a model folder or hub id"),
        ("data", data, "train", "a JSONL file"),
        ("train", train, "output_dir", RUN_FOLDER),
    ):
        if values.get(key) is None and key not in (settings.values.get(name) or {}):
            problems.append(f"{settings.origin(name)}: {name}.{key} is missing; give it {example}")
    resolve_paths(settings, model, data, problems)
    resolve_adapters(settings, peft, reward, problems)
    if kind == "ppo" and not any(reward.values()):
        problems.append(
            f"{settings.origin('reward')}: reward is missing; give it an adapter, or a function as file.py:name"
        )
    if "output_dir" in train:
        resolve_output_dir(settings, train, problems)
    if problems:
        raise UserError("\n".join(problems))

    peft_section, model_config = read_peft(settings, peft, _model_config(settings, model))
    resume, overwrite = train.pop("resume", False), train.pop("overwrite", False)
    data_section = _data_section(settings, data, kind)
    if data_section.evaluates:
        train.setdefault("eval_strategy", "steps" if "eval_steps" in train else "epoch")
    args = _trainer_config(settings, train, data_section, *KINDS[kind])
    if not data_section.evaluates and args.eval_strategy != "no":
        raise UserError(
            f"{settings.origin('train', 'eval_strategy')}: train.eval_strategy is {train['eval_strategy']!r}, and "
            "there is nothing to evaluate on; give data.eval a JSONL file, or data.eval_fraction a share of the rows"
        )
    train_section = TrainSection(args, resume, overwrite)
    return RunConfig(model_config, peft_section, data_section, train_section, settings, kind, RewardSection(**reward))


def read_model_config(settings: Settings) -> ModelConfig:
    """Check the ``model`` section alone, as generation needs it: a run's data files may be gone by then.

    Args:
        settings: of a run folder's ``config.yaml``, or from elsewhere.
    Raises:
        UserError: the section has an unknown key, a wrong type or no path.
    """
    problems: list[str] = []
    values = read_section(settings, "model", {"model": hints_of(ModelConfig)}, problems)
    if "path" not in values and not problems:
        problems.append(f"{settings.origin('model')}: model.path is missing; give it a model folder or hub id")
    resolve_paths(settings, values, {}, problems)
    if problems:
        raise UserError("\n".join(problems))
    return ModelConfig(**values)


def _nowhere(key: str) -> str:
    """Of sections whose keys stand nowhere else."""
    return ""


def read_row_template(settings: Settings) -> RowTemplate | None:
    """How a run read its rows, from the ``data`` section of its ``config.yaml``; None for rows in a known form."""
    data: Any = settings.values.get("data")
    prompt, answer = (data.get(key) if isinstance(data, Mapping) else None for key in _TEMPLATES)
    return RowTemplate(prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None


def _data_section(settings: Settings, values: dict[str, Any], kind: str) -> DataSection:
    if isinstance(values.get("cache_dir"), Path):
        values["cache_dir"] = values["cache_dir"].expanduser().absolute()
    data = DataSection(**values)
    _check_eval(settings, data)
    _check_template(settings, data, kind)
    return data


def _check_template(settings: Settings, data: DataSection, kind: str) -> None:
    """Refuse half a template, one without fields, and one for rows that are read otherwise."""
    given = [key for key in _TEMPLATES if getattr(data, key) is not None]
    if not given:
        return
    where = settings.origin("data", given[0])
    if kind != "sft":
        raise UserError(f"{where}: data.{given[0]} is for fastpeft sft; {kind} reads rows by their own keys")
    if len(given) < len(_TEMPLATES):
        other = next(key for key in _TEMPLATES if key not in given)
        raise UserError(f'{where}: data.{given[0]} needs data.{other} beside it, such as "{{answer}}"')
    try:
        RowTemplate(*(getattr(data, key) for key in _TEMPLATES))
    except UserError as error:
        raise UserError(f"{where}: data: {error}") from None


def _check_eval(settings: Settings, data: DataSection) -> None:
    """Refuse a fraction that is none, or stands beside a file."""
    if data.eval_fraction is None:
        return
    where = settings.origin("data", "eval_fraction")
    if not 0 < data.eval_fraction < 1:
        raise UserError(f"{where}: data.eval_fraction is {data.eval_fraction:g}; it must be above 0 and below 1")
    if not isinstance(data.train, Path):
        raise UserError(f"{where}: data.eval_fraction is for one file, and data.train is a list; give data.eval a file")
    if data.eval is not None:
        raise UserError(f"{where}: data.eval_fraction and data.eval both say what to evaluate on; give one of them")


def _model_config(settings: Settings, values: dict[str, Any]) -> ModelConfig:
    config = ModelConfig(**values)
    told = next((key for key in ("activation_budget_gb", "checkpointing") if values.get(key) is not None), None)
    if told is None:
        return config
    where = settings.origin("model", told)
    if config.accelerate is False:
        raise UserError(f"{where}: model.{told} is about fused layers, and model.accelerate is false; set it to true")
    mode = config.checkpointing or ("selective" if config.activation_budget_gb is not None else None)
    try:
        check_checkpointing(mode, config.activation_budget_gb)
    except UserError as error:
        raise UserError(f"{where}: {str(error).replace('accelerate: ', 'model.', 1)}") from error
    return config


def _trainer_config(
    settings: Settings, values: dict[str, Any], data: DataSection, config_class: type[BaseConfig], limit: str
) -> BaseConfig:
    shared: dict[str, Any] = {limit: data.max_length, "on_bad_row": data.on_bad_row}
    try:
        return config_class(**values, **shared)
    except (ValueError, ImportError, NotImplementedError) as error:
        message = re.sub(rf"^{config_class.__name__}:\s*", "", str(error)).replace(limit, "max_length")
        shared["max_length"] = data.max_length
        # Ours begin with the key; those of transformers name the key somewhere or begin with the value.
        texts = {key: value for key, value in values.items() if isinstance(value, str)}
        first = re.split(r"\W", message, maxsplit=1)[0]
        own = (key for key in (*hints_of(config_class), "max_length") if key == first)
        by_value = (key for key, value in texts.items() if re.match(rf"'?{re.escape(value)}\b", message))
        by_name = (key for key in {**shared, **values} if re.search(rf"\b{key}\b", message))
        key = next(own, None) or next(by_value, None) or next(by_name, None)
        section = "data" if key in shared else "train"
        where = settings.origin(section, key) if key else settings.origin(section)
        named = f"{section}.{message}" if key and message.startswith(key) else f"{section}.{key}: {message}"
        raise UserError(f"{where}: {named if key else f'{section}: {message}'}") from error
