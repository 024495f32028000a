"""What every trainer can be told: transformers' ``TrainingArguments`` with other defaults and a few fields more."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Real
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fastpeft.errors import UserError, did_you_mean

# Options of TrainingArguments that this version would ignore or break, and what to do instead.
_UNSUPPORTED = {
    "auto_find_batch_size": "lower per_device_train_batch_size, raise gradient_accumulation_steps: same loss",
    "deepspeed": "one GPU or several with torchrun (DDP) work",
    "enable_jit_checkpoint": "leave it out: SIGTERM already finishes the step and saves a checkpoint",
    "fsdp": "one GPU or several with torchrun (DDP) work",
    "label_smoothing_factor": "leave it out",
    "push_to_hub": "upload the folder after training, with huggingface_hub.upload_folder",
    "use_liger_kernel": "leave it out",
}
_SCHEDULES = tuple(kind.value for kind in SchedulerType)
_OPTIMS = tuple(name.value for name in OptimizerNames)
_SCHEDULES_WITHOUT_KWARGS = ("constant", "constant_with_warmup")  # get_scheduler drops theirs without a word
# What `optimizer` can be, and the name of `optim` in transformers that stands for it. "torch" leaves it to `optim`.
_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_OPTIM_ALIASES = {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit"}
_CHOICES = {
    "optimizer": (*_OPTIMIZERS, "torch"),
    "on_nonfinite": ("skip", "raise"),
    "on_overfitting": ("warn", "stop", "ignore"),
    "lr_scheduler_type": _SCHEDULES,
}


# What a number has to be, in words and as a test.
_Rule = tuple[str, Callable[[Any], bool]]
_FROM_0: _Rule = ("0 or more", lambda value: value >= 0)
_SHARE: _Rule = ("0 or more and less than 1", lambda value: 0 <= value < 1)
_COUNT: _Rule = ("a whole number of 1 or more", lambda value: value >= 1 and value % 1 == 0)
_SEED: _Rule = ("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32 and value % 1 == 0)
_EVERY: _Rule = ("above 0: a number of steps, or below 1 a share of the run", lambda value: value > 0)
# None passes, for the options that may be left open; NaN and infinity never do.
_RULES: dict[str, _Rule] = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _FROM_0,
    "data_seed": _SEED,
    "dataloader_num_workers": ("a whole number of 0 or more", lambda value: value >= 0 and value % 1 == 0),
    "dataloader_prefetch_factor": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "eval_delay": _FROM_0,
    "eval_steps": _EVERY,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _FROM_0,
    "logging_steps": _EVERY,
    "max_grad_norm": _FROM_0,
    "max_steps": (
        "a whole number of 1 or more, or -1 to train for num_train_epochs",
        lambda value: (value >= 1 or value == -1) and value % 1 == 0,
    ),
    "neftune_noise_alpha": _FROM_0,
    "optim_device_budget_gb": _FROM_0,
    "overfitting_patience": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "save_steps": _EVERY,
    "save_total_limit": ("a whole number of 1 or more, or null to keep every checkpoint", _COUNT[1]),
    "seed": _SEED,
    "warmup_steps": _FROM_0,
    "weight_decay": _FROM_0,
}


@dataclass
class BaseConfig(TrainingArguments):
    """Training options; every field of ``transformers.TrainingArguments`` is accepted.

    The defaults are those of QLoRA fine-tuning: ``learning_rate`` 2e-4 (full fine-tuning wants about a tenth of it),
    3% linear warm-up, cosine decay to zero, gradients clipped at norm 1, no weight decay. Weights and compute stay in
    the dtype the model was loaded in; ``bf16=True`` runs a float32 model under autocast, on a GPU or a CPU.

    Args:
        optimizer: ``"adamw"`` for `fastpeft.optim.AdamW`, ``"adamw_8bit"``, ``"paged_adamw"`` and
            ``"paged_adamw_8bit"`` for its siblings; ``"torch"`` for what ``optim`` names in transformers. None goes by
            ``optim``: its names of bitsandbytes' AdamW (``"adamw_8bit"``, ``"paged_adamw_32bit"``, ...) mean the
            siblings, which need no bitsandbytes, every other name what it means in transformers; ``"adamw"`` if neither
            is given.
        optim_device_budget_gb: with a paged optimizer, 10^9 bytes of its state that may be on the GPU; None for as much
            as there is room for.
        on_nonfinite: a step whose loss or gradient norm is NaN or infinite never changes the weights. ``"skip"`` drops
            the step and counts it in the metric ``skipped_steps``; ``"raise"`` stops the run.
        on_overfitting: what happens when the loss of the held-out rows has not come down to its best again in
            ``overfitting_patience`` evaluations in a row while the training loss fell: ``"warn"`` says so and where the
            best weights are, ``"stop"`` ends the run too, ``"ignore"`` neither. The best checkpoint is never rotated
            away.
        overfitting_patience: evaluations.
        progress: show a live table on a terminal, plain lines elsewhere; False prints nothing.
        gradient_checkpointing: recompute activations in backward instead of keeping them.
        report_to: None for TensorBoard where it is installed; ``"none"`` for metrics.jsonl alone.
    Raises:
        UserError: a value that is not one of the choices, or an option that this version does not do.
    Source:
        QLoRA, arXiv 2305.14314, appendix B.
    """

    best_metric: ClassVar[str] = "eval_loss"  # by which evaluations are compared; a loss is best where it is least

    learning_rate: float = 2e-4
    lr_scheduler_type: Any = "cosine"
    warmup_steps: float = 0.03
    max_grad_norm: float = 1.0
    logging_steps: float = 10
    save_total_limit: int | None = 3
    report_to: Any = None
    logging_nan_inf_filter: bool = False  # it waits for the device in every micro-step, to hide a NaN
    remove_unused_columns: bool = False  # a batch has more than the model's arguments
    disable_tqdm: bool | None = True  # `progress` takes its place
    ddp_find_unused_parameters: bool | None = False  # True costs a walk over the graph in every step
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    gradient_checkpointing_kwargs: Any = None
    optim: Any = field(default=None, metadata={"help": "transformers' name of an optimizer; see optimizer"})
    optimizer: str | None = field(
        default=None,
        metadata={"help": "'adamw', 'adamw_8bit', 'paged_adamw', 'paged_adamw_8bit', or 'torch' (as optim says)"},
    )
    optim_device_budget_gb: float | None = field(
        default=None, metadata={"help": "GB of a paged optimizer's state that may be on the GPU"}
    )
    on_nonfinite: str = field(default="skip", metadata={"help": "'skip' or 'raise'"})
    on_overfitting: str = field(default="warn", metadata={"help": "'warn', 'stop' or 'ignore'"})
    overfitting_patience: int = field(default=3, metadata={"help": "evaluations in a row above the best eval loss"})
    progress: bool = field(default=True, metadata={"help": "show progress on the terminal"})

    def __post_init__(self) -> None:
        self._resolve_optimizer()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                self._refuse(
                    name, f"it must be one of {', '.join(choices)}{did_you_mean(getattr(self, name), choices)}"
                )
        self._check_ranges()
        for name, advice in _UNSUPPORTED.items():
            if getattr(self, name, None):
                raise UserError(f"{type(self).__name__}: {name} is not in this version; {advice}")
        if self.report_to is None:
            self.report_to = ["tensorboard"] if find_spec("tensorboard") else []
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise transformers refuses bf16 and pins memory for a GPU that is not there
        if self.fp16 and self.use_cpu:
            self._refuse("fp16", "it needs a GPU and would do nothing on a CPU; leave it out, or use bf16")
        self._resolve_checkpointing()
        strategy = getattr(self.eval_strategy, "value", self.eval_strategy)
        if strategy != "no" and getattr(self, "metric_for_best_model", None) is None:
            self.metric_for_best_model = self.best_metric  # the best checkpoint is known then, and kept
        super().__post_init__()
        self._check_schedule()
        self._check_loggers()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process drives one GPU; torchrun starts several

    def _refuse(self, name: str, reason: str) -> None:
        """Raise the UserError about an option; it names the option first, which the YAML's messages build on."""
        value = getattr(self, name)
        value = value.value if isinstance(value, SchedulerType) else value
        raise UserError(f"{type(self).__name__}: {name} is {value!r}; {reason}")

    def _resolve_optimizer(self) -> None:
        """Settle `optimizer` and `optim`, which both may name one; afterwards both do, and name the same."""
        optim = getattr(self.optim, "value", self.optim)
        optim = _OPTIM_ALIASES.get(optim, optim)
        named = next((ours for ours, theirs in _OPTIMIZERS.items() if theirs == optim), None)
        if optim is not None and optim not in _OPTIMS:
            self._refuse("optim", f"it must be one of transformers' names{did_you_mean(str(optim), _OPTIMS)}")
        if self.optimizer is None:
            # The name of transformers' default means what it says where somebody wrote it.
            ours = "adamw" if optim is None else "torch" if named == "adamw" else named or "torch"
            self.optimizer = ours
        elif self.optimizer in _OPTIMIZERS and named not in (self.optimizer, "adamw") and optim is not None:
            self._refuse("optim", f"and optimizer is {self.optimizer!r}, which is another one; give one of the two")
        default = _OPTIMIZERS["adamw"]
        self.optim = _OPTIMIZERS.get(self.optimizer, optim or default)
        if self.optim_device_budget_gb is not None and not self.optimizer.startswith("paged"):
            self._refuse("optim_device_budget_gb", f"it is for paged optimizers, and optimizer is {self.optimizer!r}")

    def _check_ranges(self) -> None:
        for name, (words, holds) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and holds(value)):
                self._refuse(name, f"it must be {words if isinstance(value, Real) else 'a number'}")
        epochs = self.num_train_epochs
        if self.max_steps == -1 and not (_is_finite(epochs) and epochs > 0):
            self._refuse("num_train_epochs", "it must be above 0, or max_steps 1 or more")

    def _check_schedule(self) -> None:
        """Make the schedule once for a parameter of no use: what it does not take shows now and not at step 1."""
        kind, kwargs = SchedulerType(self.lr_scheduler_type).value, self.lr_scheduler_kwargs
        if kwargs and kind in _SCHEDULES_WITHOUT_KWARGS:
            self._refuse("lr_scheduler_kwargs", f"the schedule {kind!r} takes none")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        try:
            schedule = get_scheduler(kind, optimizer, 1, 100, scheduler_specific_kwargs=kwargs)
            for factor in getattr(schedule, "lr_lambdas", ()):
                factor(50)  # past the warm-up
        except (TypeError, ValueError) as error:
            reason = re.sub(r"^.*?\(\) ", "", str(error))  # without the name of transformers' function
            if kwargs:
                self._refuse("lr_scheduler_kwargs", f"the schedule {kind!r} cannot be made with it: {reason}")
            self._refuse("lr_scheduler_type", f"it needs fitting lr_scheduler_kwargs: {reason}")

    def _check_loggers(self) -> None:
        known = integration_utils.INTEGRATION_TO_CALLBACK
        installed = integration_utils.get_available_reporting_integrations()
        for name in self.report_to:
            if name not in known:
                self._refuse(
                    "report_to", f"it takes none, all, or some of {', '.join(sorted(known))}{did_you_mean(name, known)}"
                )
            if name not in installed and name != "flyte":  # flyte alone is left out of transformers' list
                self._refuse("report_to", f"the Python package for {name} is not installed; install it, or use none")

    def _resolve_checkpointing(self) -> None:
        """Give the option both of its names: transformers 5.2x renamed it and warns about the old one."""
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        for name in ("checkpointing", "checkpointing_kwargs"):
            new, old = f"activation_{name}", f"gradient_{name}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and abs(float(value)) < float("inf")
