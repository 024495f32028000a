"""NeMo 2's way to call a fine-tuning: ``finetune(model, data, trainer, ...)`` with its names.

    from fastpeft import nemo

    run = nemo.finetune(
        model=nemo.AutoModel("models/llama-3.1-8b"),
        data=nemo.SquadDataModule(dataset_root="data/squad"),
        trainer=nemo.Trainer(devices=1, precision="bf16", max_steps=100),
        peft=nemo.LoRA(dim=32, alpha=32, target_modules=["linear_qkv"]),
    )

Each argument says its part of a run's settings; what comes of them is checked and run as a YAML file is, and lies in
the run folder's ``config.yaml``. Complaints name the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.errors import UserError
from fastpeft.nemo.arguments import (
    AutoModel,
    AutoResume,
    CanonicalLoRA,
    CosineAnnealingScheduler,
    DoRA,
    FineTuningDataModule,
    HFAutoModelForCausalLM,
    LoRA,
    MegatronOptimizerModule,
    NeMoLogger,
    OptimizerConfig,
    SquadDataModule,
    Trainer,
)
from fastpeft.nemo.run_settings import RunSettings

if TYPE_CHECKING:
    from fastpeft.methods import AdapterConfig

__all__ = [
    "AutoModel",
    "AutoResume",
    "CanonicalLoRA",
    "CosineAnnealingScheduler",
    "DoRA",
    "FineTuningDataModule",
    "HFAutoModelForCausalLM",
    "LoRA",
    "MegatronOptimizerModule",
    "NeMoLogger",
    "OptimizerConfig",
    "SquadDataModule",
    "Trainer",
    "finetune",
]


def finetune(
    model: AutoModel | str | Path,
    data: FineTuningDataModule,
    trainer: Trainer | None = None,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: MegatronOptimizerModule | None = None,
    peft: LoRA | AdapterConfig | None = None,
    tokenizer: Any = "model",
    *,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Path:
    """Fine-tune a model.

    Args:
        model: what to train.
        data: what to learn from.
        trainer: how long and how; ``Trainer()`` if None.
        log: where to; ``NeMoLogger()`` if None.
        resume: whether to continue; not if None.
        optim: Adam at 1e-4 with 50 steps of warm-up and a cosine, if None.
        peft: `LoRA` and its kin, or a configuration of `fastpeft.methods`; None trains every weight.
        tokenizer: "model".
        say: called with lines about what is going on; None prints them.
        settings: further settings of section ``train`` by their own names, such as ``report_to="none"``.
    Returns:
        The run folder.
    Raises:
        UserError: an argument has no meaning here, or files are missing.
    """
    from fastpeft.recipes.schema import check_settings
    from fastpeft.recipes.sft import run_sft

    if tokenizer not in ("model", None) or data.tokenizer is not None:
        raise UserError("nemo.finetune: tokenizer is given; the model's own is used here: put its files in the folder")
    run = RunSettings(trainer or Trainer(), say)
    run.set_model(AutoModel(model) if isinstance(model, (str, Path)) else model)
    run.set_peft(peft)
    run.set_data(data)
    run.set_trainer()
    run.set_optimizer(optim or MegatronOptimizerModule())
    run.set_folder(log or NeMoLogger(), resume or AutoResume())
    for name, value in settings.items():
        run.put(f"train.{name}", value, name)
    return run_sft(check_settings(run.settings()), say)
