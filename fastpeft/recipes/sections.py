"""The sections of a run's YAML as dataclasses; `schema` reads and checks them.

    model:  {path: ..., gguf_file: ..., dtype: auto, quantize: nf4}      ModelConfig
    peft:   {method: lora, r: 16, target_modules: all-linear, ...}       the fields of the method's configuration, or
            {adapter: runs/sft/adapter}                                  (dpo, ppo) an adapter to go on from
    data:   {train: train.jsonl, eval: val.jsonl, max_length: 512}       DataSection
    reward: {adapter: runs/reward/adapter, function: rules.py:brief}     RewardSection (ppo)
    train:  {output_dir: runs/orders, max_steps: 150, ...}               the fields of the trainer's config

A kind of run is a trainer's config (`KINDS`); the sections are the same for all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from fastpeft.data import RowTemplate
from fastpeft.methods import AdapterConfig
from fastpeft.recipes.yaml_file import Settings
from fastpeft.trainers import BaseConfig, DPOConfig, PPOConfig, RewardConfig, SFTConfig

# First line of a run folder's config.yaml. What lies beside it under a run's names may be replaced by another run.
RUN_MARK = "# Settings of a fastpeft run, with defaults and paths filled in. This line marks the folder as a run's."
# Keys of train that say how one start treats the run folder, and are no setting of the run.
START_KEYS = ("resume", "overwrite")
# Each kind of run: its trainer's config, and what that calls the limit that data.max_length sets.
KINDS: dict[str, tuple[type[BaseConfig], str]] = {
    "sft": (SFTConfig, "max_length"),
    "reward": (RewardConfig, "max_length"),
    "dpo": (DPOConfig, "max_length"),
    "ppo": (PPOConfig, "max_prompt_length"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it is held in memory.

    Args:
        path: a folder in the Hugging Face layout, a hub id, or ``package:NAME`` for a folder that an installed Python
            package brings.
        gguf_file: name of a GGUF file in it, which is dequantised while loading.
        chat_template: how dialogues become text, as a Jinja template; null takes the tokenizer's own, "none" writes
            prompt and answer one after the other.
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
    chat_template: str | None = None
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


MethodName = Literal["lora", "qlora", "ia3", "prompt_tuning", "p_tuning", "adapter", "full", "none"]
WHOLE_MODEL = ("full", "none")  # methods whose result is a model and not an adapter


@dataclass(frozen=True)
class PeftSection:
    """What is trained.

    Args:
        method: "lora", "qlora" (lora, with ``model.quantize`` nf4), "ia3", "prompt_tuning", "p_tuning", "adapter"
            (bottlenecks), "full" (weights chosen by name), or "none" for all weights of the model.
        config: the method's configuration; None when ``method`` is "none", or ``adapter`` is given.
        adapter: the folder of an adapter that is trained on, and is the reference as it stands there.
    """

    method: MethodName = "lora"
    config: AdapterConfig | None = None
    adapter: Path | None = None

    @property
    def trains_whole_model(self) -> bool:
        """Whether the result is a model and not an adapter."""
        return self.method in WHOLE_MODEL

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the method puts before every text; they count in length limits."""
        return int(getattr(self.config, "num_virtual_tokens", 0))


@dataclass(frozen=True)
class DataSection:
    """The JSONL files and how rows become tokens.

    Args:
        train: rows to train on; also several files, as a list of paths or of ``{path: a.jsonl, weight: 0.7}``, where
            weights are the shares of an epoch's rows that come from each.
        eval: held-out rows for the evaluation loss, which is measured every epoch unless ``train`` says otherwise.
        eval_fraction: in place of ``eval``, the share of the training rows to hold out, rows of one prompt together.
        cache_dir: a folder for tokens: made once by worker processes, then mapped into memory.
        prompt_template: what of a row is its prompt, where rows have columns of their own: text with their names in
            braces, such as "Context: {context} Question: {question}"; for ``sft`` alone.
        answer_template: the same of the answer, such as "{answer}".
        max_length: tokens a row may have; a longer row loses the start of its prompt, never of its answer.
        on_bad_row: "error" stops at rows that cannot be used, "skip" leaves them out and counts them.
    """

    train: Path | list[Path | dict[str, Any]]
    eval: Path | None = None
    eval_fraction: float | None = None
    cache_dir: Path | None = None
    prompt_template: str | None = None
    answer_template: str | None = None
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
    def template(self) -> RowTemplate | None:
        """How rows are read that have columns of their own."""
        if self.prompt_template is None or self.answer_template is None:
            return None
        return RowTemplate(self.prompt_template, self.answer_template)

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

    @property
    def text_length(self) -> int:
        """Tokens that a row may have beside virtual ones."""
        return self.data.max_length - self.peft.virtual_tokens

    def to_yaml(self) -> str:
        """The settings with defaults, references and paths filled in: the run folder's ``config.yaml``.

        ``train.resume`` and ``train.overwrite`` are left out: they are about one start, and rerunning the file must
        not erase a run.
        """
        names = ("model", "peft", "data", *(("reward",) if self.kind == "ppo" else ()), "train")
        sections = {name: dict(self.settings.values.get(name) or {}) for name in names}
        data = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.data).items()}
        sections["model"] = vars(self.model)
        sections["peft"] = {**sections["peft"], "method": self.peft.method}
        if self.peft.adapter is not None:
            sections["peft"]["adapter"] = str(self.peft.adapter)
        if self.kind == "ppo":
            found = {key: value for key, value in vars(self.reward).items() if value is not None}
            sections["reward"] = {key: str(value) for key, value in found.items()}
        sections["data"] = {key: value for key, value in data.items() if value is not None}
        sections["train"] = {key: value for key, value in sections["train"].items() if key not in START_KEYS}
        sections["train"]["output_dir"] = str(self.output_dir)
        return f"{RUN_MARK}\n{yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=120)}"
