"""The peer's DPO step: TRL's DPOTrainer over PEFT and bitsandbytes, with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable

from bench.case import require
from bench.dpo import LEARNING_RATE, Clock, Training, pairs
from bench.peers.train_step import bitsandbytes_model
from bench.step import PROJECTIONS, Setup, word_tokenizer


def _trl(setup: Setup, clock: Clock, folder: str) -> Training:
    trl, peft, datasets = require("trl"), require("peft"), require("datasets")
    args = trl.DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=setup.batch,
        max_steps=setup.warmup + setup.steps,
        max_length=setup.tokens,
        learning_rate=LEARNING_RATE,
        bf16=True,
        gradient_checkpointing=True,
        optim="paged_adamw_32bit",
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=bitsandbytes_model(setup),
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs(setup)),
        processing_class=word_tokenizer(setup),
        peft_config=peft.LoraConfig(
            r=setup.rank, lora_alpha=32, lora_dropout=0.0, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    return Training(trainer.train, "gradient checkpointing")


STACKS: dict[str, Callable[[Setup, Clock, str], Training]] = {"trl": _trl}
