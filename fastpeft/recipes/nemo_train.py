"""NeMo's ``trainer``, ``optim`` and ``exp_manager`` -> the section ``train``.

| sched | lr_scheduler_type |
| --- | --- |
| CosineAnnealing | cosine; with min_lr cosine_with_min_lr; with constant_steps warmup_stable_decay |
| WarmupAnnealing | linear, to 0 |
| PolynomialDecayAnnealing | polynomial |
| InverseSquareRootAnnealing | inverse_sqrt |
| WarmupPolicy, none | constant_with_warmup, constant |

The last constant_steps of the run stay at min_lr. The first step of a warm-up has a rate of 0 here and of 1 /
(warmup_steps + 1) in NeMo, as transformers' schedules have it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fastpeft.errors import UserError, did_you_mean
from fastpeft.recipes.load import computes_in_bfloat16
from fastpeft.recipes.nemo_data import world_size
from fastpeft.recipes.nemo_keys import OPTIMIZERS
from fastpeft.recipes.nemo_settings import NemoSettings, count_rows
from fastpeft.recipes.paths import found
from fastpeft.recipes.yaml_file import Settings

_SCHED = "model.optim.sched"
_EXP = "exp_manager"
_CALLBACK = f"{_EXP}.checkpoint_callback_params"
_EVERY = "trainer.val_check_interval"
PRECISIONS = {
    **dict.fromkeys(("bf16", "bf16-mixed"), "bf16"),
    "bf16-true": "bf16-true",
    **dict.fromkeys(("16", "16-mixed", "fp16", "16-true"), "fp16"),
    **dict.fromkeys(("32", "32-true", "fp32"), "fp32"),
}
_SCHEDULES = (
    *("CosineAnnealing", "WarmupAnnealing", "PolynomialDecayAnnealing", "InverseSquareRootAnnealing"),
    *("WarmupPolicy", "constant"),
)


def translate_train(nemo: NemoSettings) -> None:
    """Put the section ``train``, and the dtype that the precision asks for.

    Args:
        nemo: the file's settings; data and batches stand already.
    Raises:
        UserError: a value has no meaning here.
    """
    _translate_devices(nemo)
    _translate_precision(nemo)
    _translate_optimizer(nemo)
    steps = _translate_duration(nemo)
    _translate_schedule(nemo, steps)
    _translate_folder(nemo)
    _translate_checkpoints(nemo)
    if nemo.kind == "dpo":
        _translate_dpo(nemo)
    if nemo.kind == "ppo" and nemo.flag("trainer.use_absolute_kl", True) and nemo.has("trainer.use_absolute_kl"):
        nemo.note("trainer.use_absolute_kl", "the KL in the rewards is signed here, its mean the divergence")
    if nemo.value("train.seed") is None:
        nemo.put("train.seed", 1234)
    if nemo.value("train.max_grad_norm") is None:
        nemo.put("train.max_grad_norm", 0.0)
    if nemo.value("train.logging_steps") is None and nemo.is_aligner:
        nemo.put("train.logging_steps", 1)


def _translate_devices(nemo: NemoSettings) -> None:
    devices, processes = nemo.get("trainer.devices", 1), world_size()
    if devices in ("auto", -1, "-1"):
        return
    count = len(devices) if isinstance(devices, list) else nemo.whole("trainer.devices", 1)
    nodes = nemo.whole("trainer.num_nodes", 1) or 1
    if (count or 1) * nodes != processes:
        several = f"--nnodes {nodes} " if nodes > 1 else ""
        nemo.note(
            "trainer.devices",
            f"this run has {processes} process{'es' if processes > 1 else ''}, and the global batch stays what it is; "
            f"for {(count or 1) * nodes} GPUs: torchrun {several}--nproc-per-node {count} -m fastpeft finetune ...",
        )


def _translate_precision(nemo: NemoSettings) -> None:
    name = "trainer.precision"
    given = str(nemo.get(name, "32"))
    if given not in PRECISIONS:
        raise nemo.refusal(name, f"it takes {', '.join(PRECISIONS)}{did_you_mean(given, PRECISIONS)}")
    values, said = precision_settings(given, trains_weights=nemo.value("peft.method") in ("none", "full"))
    for key, value in values.items():
        nemo.put(key, value, name)
    if "peft.master_dtype" in values and nemo.value("peft.method") == "none":
        nemo.put("peft.method", "full", "model.peft.peft_scheme")
    if said:
        nemo.note(name, said)


def precision_settings(given: str, *, trains_weights: bool) -> tuple[dict[str, Any], str]:
    """Settings of a run for Lightning's name of a precision.

    Args:
        given: one of `PRECISIONS`.
        trains_weights: the model's own weights train, and not an adapter, which is fp32 anyway.
    Returns:
        The settings, and what there is to say about them, or nothing.
    """
    precision = PRECISIONS[given]
    if precision == "fp16":
        return {"train.fp16": True, "model.dtype": "float32" if trains_weights else "float16"}, ""
    if precision == "fp32":
        return {"model.dtype": "float32"}, ""
    if not computes_in_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        said = "this CPU has no products of bfloat16, which would take many times as long; float32 it is"
        return {"model.dtype": "float32"}, said
    if precision == "bf16" and trains_weights:  # NeMo keeps fp32 masters of what trains, and so do we
        return {"model.dtype": "bfloat16", "train.bf16": True, "peft.master_dtype": "float32"}, ""
    return {"model.dtype": "bfloat16"}, ""


def _translate_optimizer(nemo: NemoSettings) -> None:
    name = "model.optim.name"
    key, value = OPTIMIZERS[nemo.choice(name, OPTIMIZERS, "fused_adam")]
    nemo.put(f"train.{key}", value, name)
    betas = nemo.get("model.optim.betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != 2:
            raise nemo.refusal("model.optim.betas", "it takes two numbers, such as [0.9, 0.98]")
        nemo.put("train.adam_beta1", betas[0], "model.optim.betas")
        nemo.put("train.adam_beta2", betas[1], "model.optim.betas")


def _translate_duration(nemo: NemoSettings) -> int | None:
    """How long to train; gives the steps of the run, or None where they cannot be told."""
    max_steps, epochs = nemo.whole("trainer.max_steps", -1), nemo.get("trainer.max_epochs")
    assert max_steps is not None
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, (int, float))):
        raise nemo.refusal("trainer.max_epochs", "it takes a number")
    if epochs == -1:
        epochs = None
    if max_steps < 1 and epochs is None:
        raise UserError(
            f"{nemo.where('trainer.max_steps')}: neither trainer.max_steps nor trainer.max_epochs says how long to "
            "train; give one of them"
        )
    an_epoch = steps_of_epoch(nemo)
    in_epochs = None if epochs is None or an_epoch is None else math.ceil(epochs * an_epoch)
    if max_steps >= 1 and (in_epochs is None or max_steps <= in_epochs):
        nemo.put("train.max_steps", max_steps, "trainer.max_steps")
        return max_steps
    nemo.put("train.num_train_epochs", epochs, "trainer.max_epochs")
    return in_epochs


def steps_of_epoch(nemo: NemoSettings) -> int | None:
    """Steps in which every row is seen once, counted in the file; None where that cannot be read."""
    path = nemo.value("data.train")
    file = found(Settings(nemo.file, {}, {}), Path(path)) if isinstance(path, str) else None
    if file is None or not file.is_file():
        return None  # the check of the section says so
    batch = nemo.value("train.per_device_train_batch_size") or 8
    accumulated = nemo.value("train.gradient_accumulation_steps") or 1
    return max(1, math.ceil(count_rows(file) / (batch * accumulated * world_size())))


def _translate_schedule(nemo: NemoSettings, steps: int | None) -> None:
    name = f"{_SCHED}.name"
    rate = nemo.value("train.learning_rate")
    kind = nemo.choice(name, _SCHEDULES, "constant")
    warmup: Any = nemo.whole(f"{_SCHED}.warmup_steps")
    if warmup is None:
        ratio = nemo.number(f"{_SCHED}.warmup_ratio", 0.0)
        warmup = ratio if steps is None else round(ratio * steps)
    if nemo.has(f"{_SCHED}.max_steps") and nemo.whole(f"{_SCHED}.max_steps") != steps:
        nemo.note(f"{_SCHED}.max_steps", "the schedule is as long as the run here")
    options: dict[str, Any] = {}
    ours = {
        "CosineAnnealing": "cosine",
        "WarmupAnnealing": "linear",
        "PolynomialDecayAnnealing": "polynomial",
        "InverseSquareRootAnnealing": "inverse_sqrt",
        "WarmupPolicy": "constant_with_warmup",
        "constant": "constant_with_warmup" if warmup else "constant",
    }[kind]
    min_lr = nemo.number(f"{_SCHED}.min_lr", 0.0)
    if min_lr and rate is None:
        raise nemo.refusal(f"{_SCHED}.min_lr", "model.optim.lr is missing, of which it is a part")
    if kind == "CosineAnnealing":
        constant = nemo.whole(f"{_SCHED}.constant_steps", 0) or 0
        if constant:
            ours, options = _with_constant_end(nemo, steps, warmup, constant, min_lr, rate)
        elif min_lr:
            ours, options = "cosine_with_min_lr", {"min_lr": min_lr}
    elif kind == "PolynomialDecayAnnealing":
        options = {"lr_end": min_lr, "power": nemo.number(f"{_SCHED}.power", 1.0)}
    elif min_lr:
        nemo.note(f"{_SCHED}.min_lr", f"{kind} goes to 0 here" if kind == "WarmupAnnealing" else f"{kind} has none")
    nemo.put("train.lr_scheduler_type", ours, name)
    nemo.put("train.warmup_steps", warmup, nemo.first(f"{_SCHED}.warmup_steps", f"{_SCHED}.warmup_ratio"))
    if options:
        nemo.put("train.lr_scheduler_kwargs", options, f"{_SCHED}.min_lr")


def _with_constant_end(
    nemo: NemoSettings, steps: int | None, warmup: Any, constant: int, min_lr: float, rate: Any
) -> tuple[str, dict[str, Any]]:
    name = f"{_SCHED}.constant_steps"
    if steps is None:
        raise nemo.refusal(name, "how many steps the run has is not known; give trainer.max_steps")
    if steps - constant - int(warmup) <= 0:
        nemo.note(
            name,
            f"the run has {steps} steps, so that nothing is left for the cosine: after the warm-up the rate stands at "
            f"min_lr {min_lr}, as in NeMo",
        )
    return cosine_with_constant_end(steps, int(warmup), constant, min_lr / rate if rate else 0.0)


def cosine_with_constant_end(steps: int, warmup: int, constant: int, ratio: float) -> tuple[str, dict[str, Any]]:
    """NeMo's CosineAnnealing with constant_steps, in transformers' names.

    Args:
        steps: of the run.
        warmup: steps of the warm-up.
        constant: last steps, at the lowest rate.
        ratio: of the lowest rate to the highest.
    Returns:
        The schedule and its options.
    """
    decay = max(0, steps - constant - warmup)
    return "warmup_stable_decay", {"num_decay_steps": decay, "num_stable_steps": 0, "min_lr_ratio": ratio}


def _translate_folder(nemo: NemoSettings) -> None:
    """The run folder: explicit_log_dir, else exp_dir and name, else NeMo's own default of both."""
    if nemo.has(f"{_EXP}.explicit_log_dir"):
        nemo.put("train.output_dir", nemo.get(f"{_EXP}.explicit_log_dir"), f"{_EXP}.explicit_log_dir")
    else:
        parent = nemo.get(f"{_EXP}.exp_dir", "nemo_experiments")
        run = nemo.get(f"{_EXP}.name") or nemo.get("name") or "default"
        nemo.put("train.output_dir", f"{parent}/{run}", nemo.first(f"{_EXP}.exp_dir", f"{_EXP}.name", "name"))
    if nemo.flag(f"{_EXP}.resume_if_exists"):
        nemo.put("train.resume", True, f"{_EXP}.resume_if_exists")
    wandb, board = f"{_EXP}.create_wandb_logger", f"{_EXP}.create_tensorboard_logger"
    if nemo.flag(wandb):
        nemo.put("train.report_to", ["wandb", *(["tensorboard"] if nemo.flag(board, True) else [])], wandb)
        if nemo.has(f"{_EXP}.wandb_logger_kwargs.name"):
            nemo.put("train.run_name", nemo.get(f"{_EXP}.wandb_logger_kwargs.name"), wandb)
    elif nemo.has(board) and not nemo.flag(board):
        nemo.put("train.report_to", "none", board)
    if nemo.flag(f"{_EXP}.create_early_stopping_callback"):
        nemo.note(f"{_EXP}.create_early_stopping_callback", "a run goes to its end in this version")


def _translate_checkpoints(nemo: NemoSettings) -> None:
    """When to evaluate and to save, and what is kept."""
    evaluates = nemo.value("data.eval") is not None
    every = _interval(nemo, _EVERY) if nemo.has(_EVERY) else None
    if evaluates and every is not None:
        nemo.put("train.eval_strategy", "steps", _EVERY)
        nemo.put("train.eval_steps", every, _EVERY)
    save_name = nemo.first("trainer.save_interval", f"{_CALLBACK}.every_n_train_steps", _EVERY)
    save = None if save_name is None else _interval(nemo, save_name)
    keep = nemo.whole(f"{_CALLBACK}.save_top_k", 1)
    if not nemo.flag(f"{_EXP}.create_checkpoint_callback", True) or keep == 0:
        nemo.put(
            "train.save_strategy", "no", nemo.first(f"{_EXP}.create_checkpoint_callback", f"{_CALLBACK}.save_top_k")
        )
        return
    if save is not None:
        nemo.put("train.save_strategy", "steps", save_name)
        nemo.put("train.save_steps", save, save_name)
    nemo.put("train.save_total_limit", None if keep == -1 else keep, f"{_CALLBACK}.save_top_k")
    if not nemo.flag(f"{_CALLBACK}.save_best_model"):
        return
    if (
        evaluates
        and every
        and save
        and save % every == 0
        and "loss" in str(nemo.get(f"{_CALLBACK}.monitor", "val_loss"))
    ):
        nemo.put("train.load_best_model_at_end", True, f"{_CALLBACK}.save_best_model")
        nemo.put("train.metric_for_best_model", "eval_loss", f"{_CALLBACK}.monitor")
        nemo.put("train.greater_is_better", False, f"{_CALLBACK}.mode")
    else:
        nemo.note(
            f"{_CALLBACK}.save_best_model", "the last weights are the result: no validation loss goes with each save"
        )


def _interval(nemo: NemoSettings, name: str) -> int:
    """Steps: a whole number says so itself, a share up to 1.0 is of an epoch."""
    value = nemo.number(name, 0)
    if isinstance(value, int) and value >= 1:
        return value
    if not 0 < value <= 1:
        raise nemo.refusal(name, "it takes a number of steps, or a share of an epoch up to 1.0")
    an_epoch = steps_of_epoch(nemo)
    return max(1, round(value * an_epoch)) if an_epoch is not None else 1


def _translate_dpo(nemo: NemoSettings) -> None:
    """The losses of NeMo-Aligner's DPO and their weights."""
    kind = "model.dpo.preference_loss"
    loss = {"dpo": "sigmoid", "ipo": "ipo"}[nemo.choice(kind, ("dpo", "ipo"), "dpo")]
    average = "model.dpo.preference_average_log_probs"
    if nemo.flag(average):
        loss = {"sigmoid": "sigmoid_norm"}.get(loss, loss)
    elif loss == "ipo" and nemo.has(average):
        nemo.note(average, "ipo takes the mean over an answer's tokens here")
    share = nemo.number("model.dpo.sft_loss_weight", 0)
    if not share:
        nemo.put("train.loss_type", loss, kind)
        return
    nemo.put("train.loss_type", [loss, "sft"], "model.dpo.sft_loss_weight")
    weights = [float(nemo.number("model.dpo.preference_loss_weight", 1)), float(share)]
    nemo.put("train.loss_weights", weights, "model.dpo.sft_loss_weight")
