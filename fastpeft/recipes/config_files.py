"""What helps to write a run's YAML: its JSON schema, and commented files to begin with.

The schema is made of the dataclasses that check the file, with their docstrings as descriptions, so that it cannot say
anything else than they do.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fastpeft.errors import UserError, did_you_mean
from fastpeft.recipes.fields import hints_of
from fastpeft.recipes.peft_section import METHODS
from fastpeft.recipes.schema import section_tables
from fastpeft.recipes.sections import KINDS, DataSection, ModelConfig, PeftSection, RewardSection, TrainSection
from fastpeft.recipes.yaml_file import Settings

_NAMES: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_NEEDED = {"model": ["path"], "data": ["train"], "train": ["output_dir"]}


def json_schema(kind: str = "sft") -> dict[str, Any]:
    """The JSON schema of a kind of run.

    Args:
        kind: "sft", "reward", "dpo" or "ppo".
    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(
            f"config schema: --kind is {kind!r}; it must be one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        )
    tables = section_tables(Settings("schema", {}, {}), kind)
    classes: dict[str, tuple[type, ...]] = {
        "model": (ModelConfig,),
        "data": (DataSection,),
        "reward": (RewardSection,),
        "train": (TrainSection, *KINDS[kind][0].__mro__),
    }
    sections = {
        name: _section(table, classes[name], _NEEDED.get(name, [])) for name, table in tables.items() if name != "peft"
    }
    sections["peft"] = _peft(from_adapter="adapter" in tables["peft"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"fastpeft {kind}",
        "type": "object",
        "additionalProperties": False,
        "required": list(_NEEDED),
        "properties": {name: sections[name] for name in tables},
    }


def _peft(*, from_adapter: bool) -> dict[str, Any]:
    """One alternative a method, told apart by ``method``; a file without it means lora."""
    shared = {"adapter": {"type": "string"}} if from_adapter else {}
    alternatives = []
    for method in ("none", *METHODS):
        config = METHODS.get(method)
        section = _section(hints_of(config), (config,), []) if config is not None else _section({}, (), [])
        section["properties"] = {"method": {"const": method}, **shared, **section["properties"]}
        section["title"] = method
        if method != "lora":
            section["required"] = ["method"]
        if method == "none":  # the keys of an adapter that is switched off may stay
            section["additionalProperties"] = True
        alternatives.append(section)
    described = descriptions(PeftSection)
    return {"type": "object", "description": described.get("method", ""), "oneOf": alternatives}


def _section(table: dict[str, Any], classes: tuple[type, ...], needed: list[str]) -> dict[str, Any]:
    told: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    for cls in reversed([cls for cls in classes if dataclasses.is_dataclass(cls)]):
        told.update(descriptions(cls))
        defaults.update({f.name: f.default for f in dataclasses.fields(cls)})
    properties = {}
    for key, hint in table.items():
        entry = schema_of(hint)
        if key in told:
            entry["description"] = told[key]
        if isinstance(default := defaults.get(key), (bool, int, float, str)):
            entry["default"] = default
        properties[key] = entry
    section = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**section, "required": needed} if needed else section


def schema_of(hint: Any) -> dict[str, Any]:
    """JSON schema of the values that a type takes.

    Args:
        hint: of a field of a section.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [schema_of(part) for part in parts]
        plain = [kind["type"] for kind in kinds if list(kind) == ["type"]]
        if len(plain) == len(kinds):
            return {"type": plain[0] if len(plain) == 1 else plain}
        return {"anyOf": kinds} if {} not in kinds else {}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is list:
        return {"type": "array", "items": schema_of(parts[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(parts[1])}
    if hint is type(None):
        return {"type": "null"}
    if hint in (list, dict):
        return {"type": "array" if hint is list else "object"}
    return {"type": _NAMES[hint]} if hint in _NAMES else {}


def descriptions(cls: type) -> dict[str, str]:
    """What a dataclass says about its fields: the ``help`` of their metadata, or its docstring's Args.

    Args:
        cls: the dataclass.
    """
    told = {f.name: f.metadata["help"] for f in dataclasses.fields(cls) if "help" in f.metadata}
    arguments = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", inspect.cleandoc(cls.__doc__ or ""), flags=re.M)
    if arguments:
        for entry in re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments[1], flags=re.M):
            told[entry[1]] = " ".join(entry[2].split())
    return {name: " ".join(str(text).split()) for name, text in told.items()}


_MODEL = """\
model:
  path: models/my-model # a folder in the Hugging Face layout, a hub id, or package:NAME
  # gguf_file: model.Q4_1.gguf # a GGUF file in it
  # dtype: auto # or bfloat16, float16, float32
  # checkpointing: full # recompute in backward: less memory, more time; selective, offload
"""
_PEFT = {
    "lora": """\
  method: lora
  r: 16 # rank
  lora_alpha: 32 # the update is scaled by lora_alpha / r
  lora_dropout: 0.0
  target_modules: all-linear # or names: [q_proj, v_proj]
  # use_dora: true
  # use_rslora: true
""",
    "qlora": """\
  method: qlora # lora over a model that is packed into 4 bits (NF4)
  r: 16 # rank
  lora_alpha: 32 # the update is scaled by lora_alpha / r
  lora_dropout: 0.0
  target_modules: all-linear # or names: [q_proj, v_proj]
""",
    "ia3": """\
  method: ia3 # one trained vector a layer
  # target_modules: [k_proj, v_proj, down_proj] # by default those that are usual for the model
  # feedforward_modules: [down_proj] # of these: the ones whose input is scaled
""",
    "prompt_tuning": """\
  method: prompt_tuning # virtual tokens before every text
  num_virtual_tokens: 20 # they count in data.max_length
  prompt_tuning_init: SAMPLE_VOCAB # or RANDOM, TEXT
""",
    "p_tuning": """\
  method: p_tuning # virtual tokens that a small network makes
  num_virtual_tokens: 20 # they count in data.max_length
  encoder_reparameterization_type: MLP # or LSTM, NEMO
  encoder_hidden_size: 128
""",
    "adapter": """\
  method: adapter # bottlenecks in every layer
  adapter_type: pfeiffer # or houlsby, parallel, parallel_adapter, linear_adapter
  # reduction_factor: 16 # the bottleneck is the hidden size divided by this
""",
    "full": """\
  method: full # the model's own weights
  # train: [layers] # which; all by default
  # freeze: [embed_tokens] # which not
  # master_dtype: float32 # with train.bf16: true
""",
    "none": """\
  method: none # all weights of the model
""",
}
_RATES = {"lora": 2e-4, "qlora": 2e-4, "ia3": 5e-3, "prompt_tuning": 3e-2, "p_tuning": 1e-3, "adapter": 1e-4}
_DATA = {
    "sft": """\
  train: data/train.jsonl # {"input", "output"}, {"prompt", "completion"}, {"messages"}, Alpaca, ShareGPT or {"text"}
  # eval: data/validation.jsonl
  max_length: 1024 # tokens; a longer row loses the beginning of its prompt, never its answer
  # on_bad_row: skip # leave bad rows out and count them; error by default
""",
    "reward": """\
  train: data/pairs.jsonl # {"prompt", "chosen", "rejected"}, or {"prompt", "responses"} with "ranking" or "scores"
  # eval: data/pairs_validation.jsonl
  max_length: 1024 # tokens of a prompt and its answer
""",
    "ppo": """\
  train: data/prompts.jsonl # rows of {"prompt"}; other keys go to the reward function
  max_length: 512 # tokens of a prompt
""",
}
_TRAIN = """\
  output_dir: runs/{name} # config.yaml, metrics.jsonl, checkpoints and the result
  # resume: true # continue from the newest checkpoint that is there
  # overwrite: true # replace a run that is there
  num_train_epochs: 3 # or max_steps: 1000
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4 # rows of a step: 4 x 4
  learning_rate: {rate}
  lr_scheduler_type: cosine
  warmup_steps: 0.03 # a share of the run, or steps
  # bf16: true # a float32 model under autocast
  # optimizer: paged_adamw_8bit # adamw, adamw_8bit, paged_adamw
  logging_steps: 10
  save_steps: 500
"""
_PPO_TRAIN = """\
  output_dir: runs/{name} # config.yaml, metrics.jsonl, completions.jsonl, checkpoints and the result
  max_steps: 100 # updates
  per_device_train_batch_size: 32 # prompts of an update
  response_length: 128 # tokens of an answer
  temperature: 1.0
  num_ppo_epochs: 2 # times an update goes over its answers
  num_mini_batches: 4 # steps of the optimizer in each
  forward_batch_size: 16 # answers in the model at a time
  kl_coef: 0.05 # how strongly the policy is held to its beginning
  learning_rate: {rate}
  logging_steps: 1
"""
_FURTHER = {
    "dpo": "  beta: 0.1 # how strongly the policy is held to its reference\n  # loss_type: sigmoid # or ipo, hinge\n",
}
_OTHER_RATES = {"reward": 1e-4, "dpo": 5e-5, "ppo": 1e-5}


def starting_file(what: str) -> str:
    """A commented YAML to begin with; it loads once the paths in it are there.

    Args:
        what: a method, for supervised fine-tuning, or "reward", "dpo" or "ppo", with LoRA.
    Raises:
        UserError: there is no such method or kind of run.
    """
    known = (*_PEFT, *_OTHER_RATES)
    if what not in known:
        raise UserError(f"config init: {what!r} is none of {', '.join(known)}{did_you_mean(what, known)}")
    kind = what if what in _OTHER_RATES else "sft"
    method = "lora" if kind != "sft" else what
    rate = _OTHER_RATES.get(kind) or _RATES.get(method, 2e-5)
    data = _DATA.get(kind, _DATA["reward"])
    train = (_PPO_TRAIN if kind == "ppo" else _TRAIN).format(name=what, rate=f"{rate:f}".rstrip("0"))
    reward = ""
    if kind == "ppo":
        reward = (
            "\nreward: # what scores answers; both add up\n  function: rules.py:score # a Python function\n"
            "  # adapter: runs/reward/adapter # what fastpeft reward leaves\n"
        )
    peft = _PEFT[method]
    if kind in ("dpo", "ppo"):
        peft += "  # in place of all of these: adapter: runs/sft/adapter # go on from it, and be held to it\n"
    return (
        f"# fastpeft {kind} THIS_FILE [section.key=value]; --dry-run shows what it comes to\n{_MODEL}\npeft:\n{peft}"
        f"\ndata:\n{data}{reward}\ntrain:\n{train}{_FURTHER.get(kind, '')}"
    )
