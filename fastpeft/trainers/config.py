"""What every trainer can be told: transformers' ``TrainingArguments`` with other defaults and a few fields more."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments

from fastpeft.errors import UserError

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


@dataclass
class BaseConfig(TrainingArguments):
    """Training options; every field of ``transformers.TrainingArguments`` is accepted.

    The defaults are those of QLoRA fine-tuning: ``learning_rate`` 2e-4 (full fine-tuning wants about a tenth of it),
    3% linear warm-up, cosine decay to zero, gradients clipped at norm 1, no weight decay. Weights and compute stay in
    the dtype the model was loaded in; ``bf16=True`` runs a float32 model under autocast, on a GPU or a CPU.

    Args:
        optimizer: ``"adamw"`` for `fastpeft.optim.AdamW`; ``"torch"`` for whatever ``optim`` names.
        on_nonfinite: a step whose loss or gradient norm is NaN or infinite never changes the weights. ``"skip"`` drops
            the step and counts it in the metric ``skipped_steps``; ``"raise"`` stops the run.
        progress: show a live line on a terminal, plain lines elsewhere; False prints nothing.
        gradient_checkpointing: recompute activations in backward instead of keeping them.
        report_to: None for TensorBoard where it is installed; ``"none"`` for metrics.jsonl alone.
    Raises:
        UserError: a value that is not one of the choices, or an option that this version does not do.
    Source:
        QLoRA, arXiv 2305.14314, appendix B.
    """

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
    optimizer: str = field(default="adamw", metadata={"help": "'adamw' (fastpeft) or 'torch' (as optim says)"})
    on_nonfinite: str = field(default="skip", metadata={"help": "'skip' or 'raise'"})
    progress: bool = field(default=True, metadata={"help": "show progress on the terminal"})

    def __post_init__(self) -> None:
        for name, choices in {"optimizer": ("adamw", "torch"), "on_nonfinite": ("skip", "raise")}.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{type(self).__name__}: {name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        for name, advice in _UNSUPPORTED.items():
            if getattr(self, name, None):
                raise UserError(f"{type(self).__name__}: {name} is not in this version; {advice}")
        if self.report_to is None:
            self.report_to = ["tensorboard"] if find_spec("tensorboard") else []
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise transformers refuses bf16 and pins memory for a GPU that is not there
        self._resolve_checkpointing()
        super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process drives one GPU; torchrun starts several

    def _resolve_checkpointing(self) -> None:
        """Give the option both of its names: transformers 5.2x renamed it and warns about the old one."""
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        for name in ("checkpointing", "checkpointing_kwargs"):
            new, old = f"activation_{name}", f"gradient_{name}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
