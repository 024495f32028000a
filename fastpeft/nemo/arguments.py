"""The arguments of `fastpeft.nemo.finetune`, in NeMo 2's names with NeMo 2's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALL_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass
class AutoModel:
    """A model in the Hugging Face layout.

    Args:
        model_name: folder, hub id, ``package:NAME``, or one of these and a GGUF file in it.
        quantize: "nf4" packs it into 4 bits; "none".
    """

    model_name: str | Path
    quantize: str = "none"


HFAutoModelForCausalLM = AutoModel


@dataclass
class Trainer:
    """How long, how often, and in which precision; Lightning's names.

    Args:
        devices: GPUs; one process drives one, so that several are started by torchrun.
        num_nodes: 1.
        accelerator: "gpu", "cpu" or "auto".
        precision: "bf16", "bf16-mixed", "bf16-true", "16", "16-mixed", "32", "32-true".
        max_steps: steps of the optimizer; -1 for ``max_epochs``.
        max_epochs: passes over the data; None for 3 where ``max_steps`` is not given.
        val_check_interval: steps from one evaluation to the next; None for one each epoch.
        log_every_n_steps: steps from one line to the next.
        gradient_clip_val: norm that gradients are clipped to; None for no clipping.
        strategy: accepted and without effect; as ``logger``.
        logger: as ``strategy``.
    """

    devices: int | str = 1
    num_nodes: int = 1
    accelerator: str = "auto"
    precision: str | int = "bf16"
    max_steps: int = -1
    max_epochs: float | None = None
    val_check_interval: int | None = None
    log_every_n_steps: int = 10
    gradient_clip_val: float | None = 1.0
    strategy: Any = None
    logger: Any = None


@dataclass
class LoRA:
    """LoRA with one A for the layers that Megatron has fused: q, k and v; gate and up.

    Args:
        target_modules: "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"; "*" stands for any part of a name,
            as in "*.layers.0.*.linear_qkv".
        exclude_modules: names of the same kind to leave out.
        dim: rank.
        alpha: the update is scaled by ``alpha / dim``.
        dropout: of the low-rank path's input.
        dropout_position: "pre"; with a dropout of 0 "post" is the same.
        lora_A_init_method: "xavier" or "uniform" (PEFT's start), "normal".
        lora_B_init_method: "zero".
    """

    target_modules: list[str] = field(default_factory=lambda: list(ALL_TARGETS))
    exclude_modules: list[str] = field(default_factory=list)
    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: str = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"


@dataclass
class CanonicalLoRA(LoRA):
    """LoRA with an A for each layer; its targets are linear_q, linear_k, linear_v, linear_proj, linear_fc1_gate, ..."""

    target_modules: list[str] = field(
        default_factory=lambda: [
            *("linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2")
        ]
    )


@dataclass
class DoRA(LoRA):
    """LoRA that trains the length of each row of the weight too."""

    alpha: float = 64


@dataclass
class FineTuningDataModule:
    """JSONL files in a folder: ``training.jsonl`` and, where there is one, ``validation.jsonl``.

    Args:
        dataset_root: the folder.
        seq_length: tokens a row may have.
        tokenizer: None for the model's.
        micro_batch_size: rows a process has at a time.
        global_batch_size: rows of a step, over all processes; a multiple of ``micro_batch_size``.
        seed: of the order of rows, and of the adapter's first values.
        num_workers: accepted and without effect; as the following.
        memmap_workers: as ``num_workers``.
        pin_memory: as ``num_workers``.
        persistent_workers: as ``num_workers``.
    """

    dataset_root: str | Path
    seq_length: int = 2048
    tokenizer: Any = None
    micro_batch_size: int = 4
    global_batch_size: int = 8
    seed: int = 1234
    num_workers: int = 0
    memmap_workers: int = 1
    pin_memory: bool = True
    persistent_workers: bool = False


@dataclass
class SquadDataModule(FineTuningDataModule):
    """SQuAD as NeMo prepares it: rows of "input" (context and question) and "output"; nothing is downloaded."""

    dataset_root: str | Path = ""


@dataclass
class OptimizerConfig:
    """Megatron's names of an optimizer's options.

    Args:
        optimizer: "adam".
        lr: learning rate.
        weight_decay: as AdamW has it.
        adam_beta1: of the mean.
        adam_beta2: of the mean square.
        adam_eps: added to the root.
        clip_grad: takes the place of the trainer's ``gradient_clip_val``.
    """

    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float | None = None


@dataclass
class CosineAnnealingScheduler:
    """A warm-up and a cosine.

    Args:
        warmup_steps: steps in which the rate rises.
        constant_steps: last steps, at ``min_lr``.
        min_lr: lowest rate.
    """

    warmup_steps: int = 50
    constant_steps: int = 0
    min_lr: float = 0.0


@dataclass
class MegatronOptimizerModule:
    """An optimizer and its schedule.

    Args:
        config: the optimizer.
        lr_scheduler: the schedule; None keeps the rate constant.
    """

    config: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: CosineAnnealingScheduler | None = field(default_factory=CosineAnnealingScheduler)


@dataclass
class NeMoLogger:
    """Where the run folder is: ``log_dir/name/<time of the start>``.

    Args:
        name: of the experiment.
        log_dir: folder of experiments; None for ``nemo_experiments``.
        explicit_log_dir: the run folder itself.
        tensorboard: accepted; TensorBoard's files are written where it is installed.
        wandb: anything but None reports to Weights & Biases.
    """

    name: str = "default"
    log_dir: str | Path | None = None
    explicit_log_dir: str | Path | None = None
    tensorboard: Any = None
    wandb: Any = None


@dataclass
class AutoResume:
    """Whether to go on from a run's newest checkpoint.

    Args:
        resume_if_exists: go on from the newest run of the experiment that has a checkpoint, if there is one.
        resume_ignore_no_checkpoint: accepted; a run without a checkpoint begins anew.
    """

    resume_if_exists: bool = False
    resume_ignore_no_checkpoint: bool = True
