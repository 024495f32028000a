"""From NeMo 2's arguments to the settings of a run.

Nothing of torch is imported before a run is put together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.errors import UserError, did_you_mean
from fastpeft.nemo.arguments import (
    ALL_TARGETS,
    AutoModel,
    AutoResume,
    DoRA,
    FineTuningDataModule,
    LoRA,
    MegatronOptimizerModule,
    NeMoLogger,
    Trainer,
)

if TYPE_CHECKING:
    from fastpeft.methods import AdapterConfig
    from fastpeft.recipes.yaml_file import Settings


class RunSettings:
    """Settings of a run, put together argument by argument, which complaints name."""

    def __init__(self, trainer: Trainer, say: Callable[[str], None] | None) -> None:
        self._trainer = trainer
        self._say = say or print
        self._values: dict[str, dict[str, Any]] = {"model": {}, "peft": {}, "data": {}, "train": {}}
        self._origins: dict[tuple[str, ...], str] = {}

    def put(self, key: str, value: Any, argument: str) -> None:
        """Set ``section.key``."""
        section, _, name = key.partition(".")
        self._values[section][name] = value
        self._origins[(section, name)] = f"nemo.finetune: {argument}"

    def settings(self) -> Settings:
        """What `fastpeft.recipes.schema.check_settings` takes."""
        from fastpeft.recipes.yaml_file import Settings

        return Settings("nemo.finetune", self._values, self._origins)

    def set_model(self, model: AutoModel) -> None:
        """Put the section ``model``."""
        from fastpeft.recipes.nemo_yaml import model_settings

        try:
            found = model_settings(str(model.model_name))
        except UserError as error:
            raise UserError(f"nemo.finetune: model {str(model.model_name)!r}: {error}") from None
        for name, value in found.items():
            self.put(f"model.{name}", value, "model")
        self.put("model.quantize", model.quantize, "AutoModel.quantize")

    def set_peft(self, peft: LoRA | AdapterConfig | None) -> None:
        """Put the section ``peft``."""
        if peft is None:
            self.put("peft.method", "none", "peft")
            return
        if not isinstance(peft, LoRA):
            from fastpeft.recipes.peft_section import METHODS

            method = next((name for name, kind in METHODS.items() if type(peft) is kind), None)
            if method is None:
                raise UserError(
                    f"nemo.finetune: peft is a {type(peft).__name__}; give LoRA, CanonicalLoRA, DoRA, or a "
                    "configuration of fastpeft.methods"
                )
            self.put("peft.method", method, "peft")
            for option in dataclasses.fields(peft):  # type: ignore[arg-type]
                self.put(f"peft.{option.name}", getattr(peft, option.name), f"{type(peft).__name__}.{option.name}")
            return
        kind = type(peft).__name__
        self.put("peft.method", "lora", "peft")
        self.put("peft.r", peft.dim, f"{kind}.dim")
        self.put("peft.lora_alpha", peft.alpha, f"{kind}.alpha")
        self.put("peft.lora_dropout", peft.dropout, f"{kind}.dropout")
        if peft.dropout and peft.dropout_position != "pre":
            raise UserError(f"nemo.finetune: {kind}.dropout_position is {peft.dropout_position!r}; it must be 'pre'")
        starts: dict[str, bool | str] = {"xavier": True, "uniform": True, "kaiming": True, "normal": "gaussian"}
        if peft.lora_A_init_method not in starts:
            raise UserError(
                f"nemo.finetune: {kind}.lora_A_init_method is {peft.lora_A_init_method!r}; it must be one of "
                f"{', '.join(starts)}{did_you_mean(peft.lora_A_init_method, starts)}"
            )
        if peft.lora_B_init_method != "zero":
            raise UserError(f"nemo.finetune: {kind}.lora_B_init_method is {peft.lora_B_init_method!r}; use 'zero'")
        self.put("peft.init_lora_weights", starts[peft.lora_A_init_method], f"{kind}.lora_A_init_method")
        self.put("peft.shared_a", type(peft) is LoRA, "peft")
        self.put("peft.use_dora", isinstance(peft, DoRA), "peft")
        self.put(
            "peft.target_modules",
            self._targets(peft.target_modules, f"{kind}.target_modules"),
            f"{kind}.target_modules",
        )
        if peft.exclude_modules:
            names = self._targets(peft.exclude_modules, f"{kind}.exclude_modules")
            self.put("peft.exclude_modules", names, f"{kind}.exclude_modules")

    def _targets(self, given: list[str], argument: str) -> list[str] | str:
        """Names of layers, or one expression where some names have a "*"."""
        from fastpeft.recipes.nemo_keys import SINGLE_TARGETS
        from fastpeft.recipes.nemo_peft import model_family, target_names

        family = model_family(self._values["model"]["path"], "nemo.finetune")
        expressions, names = [], []
        for target in given:
            pattern, _, last = target.rpartition(".")
            found = target_names(last, family)
            if found is None:
                known = [*ALL_TARGETS, *SINGLE_TARGETS]
                raise UserError(
                    f"nemo.finetune: {argument}: {target!r} is none of {', '.join(known)}{did_you_mean(last, known)}"
                )
            names += [name for name in found if name not in names]
            before = ".*".join(re.escape(part) for part in f"{pattern}.".split("*")) if pattern else r"(.*\.)?"
            expressions += [rf"{before}(.*\.)?{re.escape(name)}" for name in found]
        return "|".join(expressions) if any("." in target for target in given) else names

    def set_data(self, data: FineTuningDataModule) -> None:
        """Put the section ``data`` and the batches."""
        from fastpeft.recipes.nemo_data import world_size

        kind = type(data).__name__
        root = Path(data.dataset_root)
        if not str(data.dataset_root) or not (root / "training.jsonl").is_file():
            raise UserError(
                f"nemo.finetune: {kind}.dataset_root is {str(data.dataset_root)!r}; nothing is downloaded, so that "
                "it has to be a folder with training.jsonl (rows of 'input' and 'output') and, to evaluate on, "
                "validation.jsonl"
            )
        self.put("data.train", str(root / "training.jsonl"), f"{kind}.dataset_root")
        if (root / "validation.jsonl").is_file():
            self.put("data.eval", str(root / "validation.jsonl"), f"{kind}.dataset_root")
        self.put("data.max_length", data.seq_length, f"{kind}.seq_length")
        processes = world_size()
        steps, rest = divmod(data.global_batch_size, max(1, data.micro_batch_size * processes))
        if rest or not steps:
            raise UserError(
                f"nemo.finetune: {kind}.global_batch_size is {data.global_batch_size}; it has to be a multiple of "
                f"micro_batch_size {data.micro_batch_size} times {processes} process{'es' if processes > 1 else ''}"
            )
        self.put("train.per_device_train_batch_size", data.micro_batch_size, f"{kind}.micro_batch_size")
        self.put("train.per_device_eval_batch_size", data.micro_batch_size, f"{kind}.micro_batch_size")
        self.put("train.gradient_accumulation_steps", steps, f"{kind}.global_batch_size")
        self.put("train.seed", data.seed, f"{kind}.seed")

    def set_trainer(self) -> None:
        """Put what the trainer says."""
        from fastpeft.recipes.nemo_data import world_size
        from fastpeft.recipes.nemo_train import PRECISIONS, precision_settings

        trainer, processes = self._trainer, world_size()
        if trainer.num_nodes != 1:
            raise UserError(
                f"nemo.finetune: Trainer.num_nodes is {trainer.num_nodes}; start the script with torchrun --nnodes"
            )
        if trainer.devices not in ("auto", -1, processes):
            self._say(
                f"Trainer.devices is {trainer.devices}, and this run has {processes} process"
                f"{'es' if processes > 1 else ''}; the global batch stays what it is. For {trainer.devices} GPUs start "
                f"the script with torchrun --nproc-per-node {trainer.devices}"
            )
        precision = str(trainer.precision)
        if precision not in PRECISIONS:
            raise UserError(
                f"nemo.finetune: Trainer.precision is {precision!r}; it must be one of "
                f"{', '.join(PRECISIONS)}{did_you_mean(precision, PRECISIONS)}"
            )
        method = self._values["peft"]["method"]
        found, said = precision_settings(precision, trains_weights=method in ("none", "full"))
        if said:
            self._say(f"Trainer.precision: {said}")
        if "peft.master_dtype" in found and method == "none":
            self.put("peft.method", "full", "peft")
        for key, value in found.items():
            self.put(key, value, "Trainer.precision")
        self.put("train.use_cpu", trainer.accelerator == "cpu", "Trainer.accelerator")
        if trainer.max_steps > 0:
            self.put("train.max_steps", trainer.max_steps, "Trainer.max_steps")
        elif trainer.max_epochs is not None:
            self.put("train.num_train_epochs", trainer.max_epochs, "Trainer.max_epochs")
        if trainer.val_check_interval is not None and "eval" in self._values["data"]:
            self.put("train.eval_steps", trainer.val_check_interval, "Trainer.val_check_interval")
        self.put("train.logging_steps", trainer.log_every_n_steps, "Trainer.log_every_n_steps")
        self.put("train.max_grad_norm", trainer.gradient_clip_val or 0.0, "Trainer.gradient_clip_val")

    def set_optimizer(self, optim: MegatronOptimizerModule) -> None:
        """Put the optimizer and its schedule."""
        from fastpeft.recipes.nemo_train import cosine_with_constant_end

        config, schedule = optim.config, optim.lr_scheduler
        if config.optimizer not in ("adam", "adamw"):
            raise UserError(f"nemo.finetune: OptimizerConfig.optimizer is {config.optimizer!r}; it must be 'adam'")
        for ours, theirs in (
            ("learning_rate", "lr"),
            ("weight_decay", "weight_decay"),
            ("adam_beta1", "adam_beta1"),
            ("adam_beta2", "adam_beta2"),
            ("adam_epsilon", "adam_eps"),
            ("max_grad_norm", "clip_grad"),
        ):
            if (value := getattr(config, theirs)) is not None:
                self.put(f"train.{ours}", value, f"OptimizerConfig.{theirs}")
        if schedule is None:
            self.put("train.lr_scheduler_type", "constant", "MegatronOptimizerModule.lr_scheduler")
            self.put("train.warmup_steps", 0, "MegatronOptimizerModule.lr_scheduler")
            return
        name: str = "cosine"
        options: dict[str, Any] = {}
        if schedule.constant_steps:
            if self._trainer.max_steps < 1:
                raise UserError(
                    "nemo.finetune: CosineAnnealingScheduler.constant_steps is given; it needs Trainer.max_steps, from "
                    "whose end it is counted"
                )
            name, options = cosine_with_constant_end(
                self._trainer.max_steps, schedule.warmup_steps, schedule.constant_steps, schedule.min_lr / config.lr
            )
        elif schedule.min_lr:
            name, options = "cosine_with_min_lr", {"min_lr": schedule.min_lr}
        self.put("train.lr_scheduler_type", name, "MegatronOptimizerModule.lr_scheduler")
        self.put("train.warmup_steps", schedule.warmup_steps, "CosineAnnealingScheduler.warmup_steps")
        if options:
            self.put("train.lr_scheduler_kwargs", options, "CosineAnnealingScheduler.min_lr")

    def set_folder(self, log: NeMoLogger, resume: AutoResume) -> None:
        """Put the run folder, and whether to go on in it."""
        from fastpeft.trainers.checkpoint import sealed_steps

        if log.explicit_log_dir is not None:
            folder = Path(log.explicit_log_dir)
        else:
            parent = Path(log.log_dir or "nemo_experiments") / log.name
            folder = parent / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
            if resume.resume_if_exists and parent.is_dir():
                begun = [path for path in sorted(parent.iterdir()) if path.is_dir() and sealed_steps(path)]
                folder = begun[-1] if begun else folder
        self.put("train.output_dir", str(folder), "NeMoLogger")
        self.put("train.resume", resume.resume_if_exists, "AutoResume.resume_if_exists")
        if log.wandb is not None:
            self.put("train.report_to", ["wandb", "tensorboard"], "NeMoLogger.wandb")
