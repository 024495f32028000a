"""The YAML of ``fastpeft sft | reward | dpo | ppo``: its sections as dataclasses, and complaints that name lines.

    model:  {path: ..., gguf_file: ..., dtype: auto, quantize: nf4}      ModelConfig
    peft:   {method: lora, r: 16, target_modules: all-linear, ...}       the fields of LoraConfig, or (dpo, ppo)
            {adapter: runs/sft/adapter}                                  an adapter to go on from and be held to
    data:   {train: train.jsonl, eval: val.jsonl, max_length: 512}       DataSection
    reward: {adapter: runs/reward/adapter, function: rules.py:brief}     RewardSection (ppo)
    train:  {output_dir: runs/orders, max_steps: 150, ...}               the fields of the trainer's config

Everything here is checked without opening the model: keys, types, ranges, and whether the data files exist.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from fastpeft.errors import UserError, did_you_mean
from fastpeft.methods import LoraConfig
from fastpeft.models.accelerate import check_checkpointing
from fastpeft.recipes.yaml_file import Settings, read_settings, shown
from fastpeft.trainers import BaseConfig, DPOConfig, PPOConfig, RewardConfig, SFTConfig

# First line of a run folder's config.yaml. What lies beside it under a run's names may be replaced by another run.
RUN_MARK = "# Settings of a fastpeft run, with defaults and paths filled in. This line marks the folder as a run's."

_LISTED_KEYS = 24  # a section with more keys is not listed in a message
# Fields of TrainingArguments that only transformers' example scripts read.
_NO_TRAIN_KEYS = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint")
# Keys of train that say how one start treats the run folder, and are no setting of the run.
_START_KEYS = ("resume", "overwrite")
# Types that need no conversion, with what counts as one; a truth value is no number, whatever Python says.
_PLAIN: dict[Any, Any] = {
    **{kind: kind for kind in (bool, int, str, list, dict, type(None))},
    float: (int, float),
}
# Each kind of run: its trainer's config, and what that calls the limit that data.max_length sets.
KINDS: dict[str, tuple[type[BaseConfig], str]] = {
    "sft": (SFTConfig, "max_length"),
    "reward": (RewardConfig, "max_length"),
    "dpo": (DPOConfig, "max_length"),
    "ppo": (PPOConfig, "max_prompt_length"),
}
_FROM_ADAPTER = ("dpo", "ppo")  # kinds that can go on from an adapter
_RUN_FOLDER = "a folder for the run, such as runs/first"
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it is held in memory.

    Args:
        path: a folder in the Hugging Face layout, a hub id, or ``package:NAME`` for a folder that an installed Python
            package brings.
        gguf_file: name of a GGUF file in it, which is dequantised while loading.
        dtype: "auto" takes the checkpoint's (bfloat16 for GGUF, where the device computes in it).
        quantize: "nf4" packs every linear layer but the output embedding into 4 bits.
        double_quant: quantise the NF4 scales too.
        block_size: weights that share one NF4 scale.
        skip_modules: names of further linear layers to leave unquantised.
        accelerate: put fused blocks into the model for training; null does so on a GPU.
        checkpointing: what the fused layers recompute in backward: "full", "selective", "offload" or "none"; null
            leaves it to ``train.gradient_checkpointing``, which means "full".
        activation_budget_gb: with "selective", gigabytes that activations may take.
    """

    path: str
    gguf_file: str | None = None
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    quantize: Literal["nf4", "none"] = "none"
    double_quant: bool = True
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    skip_modules: list[str] = dataclasses.field(default_factory=list)
    accelerate: bool | None = None
    checkpointing: Literal["full", "selective", "offload", "none"] | None = None
    activation_budget_gb: float | None = None

    def accelerates(self, device: torch.device) -> bool:
        """Whether a model on this device gets fused blocks."""
        return device.type == "cuda" if self.accelerate is None else self.accelerate


@dataclass(frozen=True)
class PeftSection:
    """What is trained.

    Args:
        method: "lora", or "none" for all weights of the model.
        lora: the adapter; None when ``method`` is "none", or ``adapter`` is given.
        adapter: the folder of an adapter that is trained on, and is the reference as it stands there.
    """

    method: Literal["lora", "none"] = "lora"
    lora: LoraConfig | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class DataSection:
    """The JSONL files and how rows become tokens.

    Args:
        train: rows to train on; for ``fastpeft sft`` also several files, as a list of paths or of ``{path: a.jsonl,
            weight: 0.7}``, where weights are the shares of an epoch's rows that come from each.
        eval: held-out rows for the evaluation loss, which is measured every epoch unless ``train`` says otherwise.
        eval_fraction: in place of ``eval``, the share of the training rows to hold out, rows of one prompt together.
        cache_dir: a folder for tokens (``fastpeft sft``): made once by worker processes, then mapped into memory.
        max_length: tokens a row may have; a longer row loses the start of its prompt, never of its answer.
        on_bad_row: "error" stops at rows that cannot be used, "skip" leaves them out and counts them.
    """

    train: Path | list[Path | dict[str, Any]]
    eval: Path | None = None
    eval_fraction: float | None = None
    cache_dir: Path | None = None
    max_length: int = 1024
    on_bad_row: Literal["error", "skip"] = "error"

    @property
    def train_files(self) -> list[tuple[Path, float | None]]:
        """The files to train on, with their weights where they have some."""
        if isinstance(self.train, Path):
            return [(self.train, None)]
        given: list[dict[str, Any]] = [file if isinstance(file, dict) else {"path": file} for file in self.train]
        return [(Path(file["path"]), file.get("weight")) for file in given]

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        return self.eval is not None or self.eval_fraction is not None


@dataclass(frozen=True)
class RewardSection:
    """What scores completions in ``fastpeft ppo``; two scores add up.

    Args:
        adapter: the folder of a reward adapter, as ``fastpeft reward`` leaves it.
        function: a Python function as ``file.py:name``.
    """

    adapter: Path | None = None
    function: str | None = None


@dataclass(frozen=True)
class TrainSection:
    """How long and how fast.

    Args:
        args: the trainer's arguments.
        resume: continue from the newest checkpoint in ``args.output_dir``, where there is one.
        overwrite: replace an earlier run in ``args.output_dir``.
    """

    args: BaseConfig
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class RunConfig:
    """One run: the sections, and the settings they were read from."""

    model: ModelConfig
    peft: PeftSection
    data: DataSection
    train: TrainSection
    settings: Settings
    kind: str = "sft"
    reward: RewardSection = RewardSection()

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(str(self.train.args.output_dir))

    def to_yaml(self) -> str:
        """The settings with defaults, references and paths filled in: the run folder's ``config.yaml``.

        ``train.resume`` and ``train.overwrite`` are left out: they are about one start, and rerunning the file must
        not erase a run.
        """
        names = ("model", "peft", "data", *(("reward",) if self.kind == "ppo" else ()), "train")
        sections = {name: dict(self.settings.values.get(name) or {}) for name in names}
        data = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.data).items()}
        sections["model"] = vars(self.model)
        sections["peft"] = {"method": self.peft.method, **sections["peft"]}
        if self.peft.adapter is not None:
            sections["peft"]["adapter"] = str(self.peft.adapter)
        if self.kind == "ppo":
            found = {key: value for key, value in vars(self.reward).items() if value is not None}
            sections["reward"] = {key: str(value) for key, value in found.items()}
        sections["data"] = {key: value for key, value in data.items() if value is not None}
        sections["train"] = {key: value for key, value in sections["train"].items() if key not in _START_KEYS}
        sections["train"]["output_dir"] = str(self.output_dir)
        return f"{RUN_MARK}\n{yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=120)}"


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
    settings = read_settings(path, overrides)
    lora_hints = _hints(LoraConfig)
    config_class, limit = KINDS[kind]
    elsewhere = {*_hints(DataSection), *_NO_TRAIN_KEYS, limit}
    args_hints = {key: hint for key, hint in _hints(config_class).items() if key not in elsewhere}
    peft_hints = _hints(PeftSection)
    from_adapter = {"adapter": peft_hints["adapter"]} if kind in _FROM_ADAPTER else {}
    tables = {
        "model": _hints(ModelConfig),
        "peft": {"method": peft_hints["method"], **from_adapter, **lora_hints},
        "data": _hints(DataSection),
        **({"reward": _hints(RewardSection)} if kind == "ppo" else {}),
        "train": {**dict.fromkeys(_START_KEYS, bool), **args_hints},
    }
    problems = [
        f"{settings.origin(name)}: unknown key {name!r} at the top level{_section_suggestion(name, tables)}"
        for name in settings.values
        if name not in tables
    ]
    read = {name: _read_section(settings, name, tables, problems) for name in tables}
    model, peft, data, train = (read[name] for name in ("model", "peft", "data", "train"))
    reward = read.get("reward", {})
    for name, values, key, example in (
        ("model", model, "path", "a model folder or hub id"),
        ("data", data, "train", "a JSONL file"),
        ("train", train, "output_dir", _RUN_FOLDER),
    ):
        if values.get(key) is None and key not in (settings.values.get(name) or {}):
            problems.append(f"{settings.origin(name)}: {name}.{key} is missing; give it {example}")
    _resolve_paths(settings, model, data, problems)
    _resolve_adapters(settings, peft, reward, problems)
    if kind == "ppo" and not any(reward.values()):
        problems.append(
            f"{settings.origin('reward')}: reward is missing; give it an adapter, or a function as file.py:name"
        )
    if "output_dir" in train:
        _resolve_output_dir(settings, train, problems)
    if problems:
        raise UserError("\n".join(problems))

    method, adapter = peft.pop("method", "lora"), peft.pop("adapter", None)
    if adapter is not None and (peft or method != "lora"):
        key = next(iter(peft), "method")
        raise UserError(
            f"{settings.origin('peft', key)}: peft.{key} does not go with peft.adapter, whose own settings stay; leave "
            "one of them out"
        )
    lora = _lora_config(settings, peft)
    model_config = _model_config(settings, model)
    if method == "none" and model_config.quantize != "none":
        raise UserError(
            f"{settings.origin('peft', 'method')}: peft.method none trains all weights, and model.quantize "
            f"{model_config.quantize} freezes them; use peft.method lora or model.quantize none"
        )
    resume, overwrite = train.pop("resume", False), train.pop("overwrite", False)
    if isinstance(data.get("cache_dir"), Path):
        data["cache_dir"] = data["cache_dir"].expanduser().absolute()
        if kind != "sft":
            raise UserError(f"{settings.origin('data', 'cache_dir')}: data.cache_dir is for fastpeft sft; leave it out")
    data_section = DataSection(**data)
    if kind != "sft" and not isinstance(data_section.train, Path):
        raise UserError(f"{settings.origin('data', 'train')}: several files are for fastpeft sft; join them into one")
    _check_eval(settings, data_section)
    if data_section.evaluates:
        train.setdefault("eval_strategy", "steps" if "eval_steps" in train else "epoch")
    args = _trainer_config(settings, train, data_section, config_class, limit)
    if not data_section.evaluates and args.eval_strategy != "no":
        raise UserError(
            f"{settings.origin('train', 'eval_strategy')}: train.eval_strategy is {train['eval_strategy']!r}, and "
            "there is nothing to evaluate on; give data.eval a JSONL file, or data.eval_fraction a share of the rows"
        )
    peft_section = PeftSection(method, lora if method == "lora" and adapter is None else None, adapter)
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
    values = _read_section(settings, "model", {"model": _hints(ModelConfig)}, problems)
    if "path" not in values and not problems:
        problems.append(f"{settings.origin('model')}: model.path is missing; give it a model folder or hub id")
    _resolve_paths(settings, values, {}, problems)
    if problems:
        raise UserError("\n".join(problems))
    return ModelConfig(**values)


def _hints(cls: type) -> dict[str, Any]:
    """Type of each field that the constructor of a dataclass takes."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _read_section(
    settings: Settings, section: str, tables: Mapping[str, Mapping[str, Any]], problems: list[str]
) -> dict[str, Any]:
    """The section's values, converted to their types; complaints are appended to ``problems``."""
    given = settings.values.get(section) or {}
    if not isinstance(given, dict):
        problems.append(f"{settings.origin(section)}: {section} is {shown(given)}; it takes keys and values")
        return {}
    values = {}
    for key, value in given.items():
        where = settings.origin(section, key)
        if key not in tables[section]:
            own_first = {section: tables[section], **tables}
            problems.append(f"{where}: unknown key {key!r} in {section}{_suggestion(key, own_first)}")
            continue
        try:
            values[key] = _convert(value, tables[section][key])
        except TypeError:
            allowed = _described(tables[section][key])
            nearest = did_you_mean(value, allowed.split(", "))
            problems.append(f"{where}: {section}.{key} is {shown(value)}; it takes {allowed}{nearest}")
    return values


def _suggestion(key: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """What an unknown key was probably meant to be; ``tables`` begins with the section it stands in."""
    own, *others = tables
    nearest = did_you_mean(key, tables[own])
    if nearest:
        return nearest
    home = next((name for name in others if key in tables[name]), None)
    if home is not None:
        return f"; it belongs in {home}"
    if len(tables[own]) <= _LISTED_KEYS:
        return f"; the keys are {', '.join(tables[own])}"
    return ""


def _section_suggestion(key: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """What an unknown key at the top level was probably meant to be: a section's key, or a section."""
    homes = [name for name in tables if key in tables[name]]
    section = did_you_mean(key, tables)
    if section and not homes:
        return section
    dotted = {f"{name}.{own}": own for name in tables for own in tables[name]}
    near = [key] if homes else difflib.get_close_matches(key, dotted.values(), n=1)
    if near:
        return f"; did you mean {' or '.join(full for full, own in dotted.items() if own == near[0])}?"
    return f"; the keys are {', '.join(tables)}"


def _convert(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` has it; TypeError when it is not of that type."""
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if kind in (Union, UnionType):
        for part in parts:
            try:
                return _convert(value, part)
            except TypeError:
                continue
    elif kind is Literal:
        if any(value == part and type(value) is type(part) for part in parts):
            return value
    elif kind is list and isinstance(value, list):
        return [_convert(item, parts[0]) for item in value]
    elif kind is dict and isinstance(value, dict):
        return {key: _convert(item, parts[1]) for key, item in value.items()}
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3 steps
    elif hint in _PLAIN and isinstance(value, _PLAIN[hint]) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def _described(hint: Any) -> str:
    """A type in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        described = (_described(part) for part in parts)
        return " or ".join(dict.fromkeys(words for words in described if words))
    if kind is Literal:
        return ", ".join(map(str, parts))
    if kind in (list, dict):
        return f"{_WORDS[kind]} of {_described(parts[-1])}" if parts[-1] is not Any else _WORDS[kind]
    return _WORDS.get(hint, "")


def _found(settings: Settings, path: Path) -> Path | None:
    """A path made absolute: from the current folder, else from the YAML's; None if it is in neither."""
    folders = [Path.cwd(), Path(settings.name).resolve().parent]
    return next((full for folder in folders if (full := folder / path.expanduser()).exists()), None)


def _resolve_adapters(settings: Settings, peft: dict[str, Any], reward: dict[str, Any], problems: list[str]) -> None:
    """Make the paths of adapters and of the reward function's file absolute; they have to exist."""
    for section, values in (("peft", peft), ("reward", reward)):
        if isinstance(path := values.get("adapter"), Path):
            where = settings.origin(section, "adapter")
            full = _found(settings, path)
            if full is None:
                problems.append(f"{where}: {section}.adapter: there is no folder {path}")
            elif not (full / "adapter_config.json").is_file():
                problems.append(
                    f"{where}: {section}.adapter: {path} is no adapter: there is no adapter_config.json in it"
                )
            values["adapter"] = full
    function = reward.get("function")
    if isinstance(function, str):
        where = settings.origin("reward", "function")
        file, _, name = function.rpartition(":")
        full = _found(settings, Path(file)) if file else None
        if not name.isidentifier() or not file.endswith(".py"):
            problems.append(
                f"{where}: reward.function is {function!r}; give the file and the function, as rules.py:brief"
            )
        elif full is None:
            problems.append(f"{where}: reward.function: there is no file {file}")
        else:
            reward["function"] = f"{full}:{name}"


def _resolve_paths(settings: Settings, model: dict[str, Any], data: dict[str, Any], problems: list[str]) -> None:
    """Make paths absolute; data files have to exist."""
    for key in ("train", "eval"):
        if isinstance(path := data.get(key), Path):
            full = _found(settings, path)
            if full is None:
                beside = f" or beside {settings.name}" if not path.expanduser().is_absolute() else ""
                here = " in the current folder" if beside else ""
                problems.append(f"{settings.origin('data', key)}: data.{key}: there is no file {path}{here}{beside}")
            elif not full.is_file():
                problems.append(f"{settings.origin('data', key)}: data.{key}: {path} is a folder; give a JSONL file")
            data[key] = full
    if isinstance(data.get("train"), list):
        data["train"] = _resolve_files(settings, data["train"], problems)
    if isinstance(path := model.get("path"), str) and not path.startswith("package:"):
        model["path"] = str(_found(settings, Path(path)) or path)


def _resolve_files(settings: Settings, files: list[Any], problems: list[str]) -> list[dict[str, Any]]:
    """The entries of a list of files with absolute paths; each is checked."""
    where = settings.origin("data", "train")
    resolved: list[dict[str, Any]] = []
    for number, given in enumerate(files):
        place = f"{where}: data.train[{number}]"
        file = dict(given) if isinstance(given, dict) else {"path": str(given)}
        unknown = next((key for key in file if key not in ("path", "weight")), None)
        weight = file.get("weight")
        full = _found(settings, Path(file["path"])) if isinstance(file.get("path"), str) else None
        if unknown is not None or "path" not in file:
            problems.append(f"{place} is {given}; it takes a path, or path and weight")
        elif full is None or not full.is_file():
            problems.append(f"{place}: there is no file {file['path']}")
        elif weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf")
        ):
            problems.append(f"{place}: weight is {shown(weight)}; it must be a number above 0")
        else:
            file["path"] = str(full)
        resolved.append(file)
    if not files:
        problems.append(f"{where}: data.train is an empty list; give it a JSONL file")
    elif 0 < sum(file.get("weight") is not None for file in resolved) < len(resolved):
        problems.append(f"{where}: some files of data.train have a weight and some have none; give each one, or none")
    return resolved


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


def _resolve_output_dir(settings: Settings, train: dict[str, Any], problems: list[str]) -> None:
    """Make the run folder's path absolute; whether it can be made is for the run to find out."""
    given = train["output_dir"]
    where = settings.origin("train", "output_dir")
    if given is None or not given.strip():
        problems.append(f"{where}: train.output_dir is {'null' if given is None else 'empty'}; give it {_RUN_FOLDER}")
        return
    try:
        train["output_dir"] = str(Path(given).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, the home of nobody, a zero byte
        problems.append(f"{where}: train.output_dir {given}: it cannot be a folder: {error}")


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


def _lora_config(settings: Settings, values: dict[str, Any]) -> LoraConfig:
    try:
        return LoraConfig(**values)
    except UserError as error:
        message = re.sub(r"^LoraConfig:\s*", "", str(error))  # what follows begins with the key
        key = re.split(r"\W", message, maxsplit=1)[0]
        raise UserError(f"{settings.origin('peft', key)}: peft.{message}") from error


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
        own = (key for key in (*_hints(config_class), "max_length") if key == first)
        by_value = (key for key, value in texts.items() if re.match(rf"'?{re.escape(value)}\b", message))
        by_name = (key for key in {**shared, **values} if re.search(rf"\b{key}\b", message))
        key = next(own, None) or next(by_value, None) or next(by_name, None)
        section = "data" if key in shared else "train"
        where = settings.origin(section, key) if key else settings.origin(section)
        named = f"{section}.{message}" if key and message.startswith(key) else f"{section}.{key}: {message}"
        raise UserError(f"{where}: {named if key else f'{section}: {message}'}") from error
