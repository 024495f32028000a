"""The three stages of RLHF on a small model, one after another: fine-tuning, a reward model, and PPO.

    python examples/rlhf_demo.py [--out FOLDER] [--steps N] [--prompts N]

Runs what ``fastpeft sft``, ``fastpeft reward`` and ``fastpeft ppo`` run, with the files in examples/rlhf, and then lets
the models before and after PPO answer held-out questions. Leaves three run folders and rlhf.json with the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from rlhf.rules import quality

import fastpeft
from fastpeft.data import build_prompt_dataset
from fastpeft.methods import PeftModel
from fastpeft.recipes import load_config, load_model, run_ppo, run_reward, run_sft
from fastpeft.trainers.metrics import Meter

HERE = Path(__file__).parent / "rlhf"
STAGES = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}
TITLES = {
    "sft": "1. Supervised fine-tuning: answers of four kinds",
    "reward": "2. The reward model: rankings of answers",
    "ppo": "3. PPO: policy, reference, value and reward on one model",
}
console = Console(highlight=False, soft_wrap=False)


@dataclass(frozen=True)
class Answers:
    """What a model said to the held-out questions."""

    texts: list[str]
    reward: float
    quality: float
    kl: float


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune, learn a reward model, and run PPO, on a small model.")
    parser.add_argument("--out", default="runs/rlhf", help="run folders go here; earlier runs in them are replaced")
    parser.add_argument("--steps", type=int, help="steps of each stage, instead of the YAMLs'")
    parser.add_argument("--prompts", type=int, default=12, help="held-out questions")
    return parser.parse_args(arguments)


def overrides(stage: str, options: argparse.Namespace) -> list[str]:
    out = Path(options.out).resolve()
    given = [f"train.output_dir={out / stage}", "train.overwrite=true"]
    if options.steps is not None:
        given.append(f"train.max_steps={options.steps}")
    if stage == "ppo":
        given += [f"peft.adapter={out / 'sft' / 'adapter'}", f"reward.adapter={out / 'reward' / 'adapter'}"]
    return given


def compare(options: argparse.Namespace) -> tuple[Answers, Answers, Answers]:
    """The answers of the model before PPO, twice, and after it."""
    out = Path(options.out).resolve()
    config = load_config(HERE / "ppo.yaml", overrides("ppo", options), kind="ppo")
    model, tokenizer = load_model(config.model)
    policy = PeftModel.from_pretrained(model, out / "sft" / "adapter", is_trainable=True)
    policy.load_adapter(out / "sft" / "adapter", "reference")
    fastpeft.attach_score(policy)
    policy.load_adapter(out / "reward" / "adapter", "reward")
    prompts = build_prompt_dataset(HERE / "data" / "prompts_test.jsonl", tokenizer)
    args = fastpeft.PPOConfig(
        output_dir=str(out / "ppo"),
        advantage="group",  # it needs no value head
        num_generations=2,
        response_length=config.train.args.response_length,
        temperature=config.train.args.temperature,
        ref_adapter_name="reference",
        reward_adapter_name="reward",
        report_to="none",
        progress=False,
    )
    trainer = fastpeft.PPOTrainer(policy, args, prompts, processing_class=tokenizer)
    items = [prompts[index] for index in range(min(options.prompts, len(prompts)))]

    def answer(seed: int) -> Answers:
        torch.manual_seed(seed)
        rollout = trainer.roll_out(items, Meter(args.device))
        asked = [item["prompt"] for item in items for _ in range(args.num_generations)]
        texts = [text.strip() for text in rollout.texts]
        rated = mean(quality(prompt, text) for prompt, text in zip(asked, texts, strict=True))
        return Answers(texts, float(rollout.scores.mean()), rated, float(rollout.mean_kl()))

    before, again = answer(0), answer(1)
    policy.load_adapter_weights(out / "ppo" / "adapter", "default")
    return before, again, answer(1)


def win_share(ours: Answers, theirs: Answers, prompts: Sequence[str]) -> float:
    """How often ours is the better answer by the rule; a tie is half a win."""
    won = 0.0
    for prompt, one, other in zip(prompts, ours.texts, theirs.texts, strict=True):
        a, b = quality(prompt, one), quality(prompt, other)
        won += 0.5 if a == b else float(a > b)
    return won / len(ours.texts)


def run(options: argparse.Namespace) -> Path:
    begin = time.perf_counter()
    seconds: dict[str, float] = {}
    for stage, run_stage in STAGES.items():
        console.rule(f"[bold]{TITLES[stage]}", align="left")
        started = time.perf_counter()
        run_stage(load_config(HERE / f"{stage}.yaml", overrides(stage, options), kind=stage))
        seconds[stage] = round(time.perf_counter() - started, 1)
    console.rule("[bold]4. Held-out questions, before PPO and after", align="left")
    started = time.perf_counter()
    before, again, after = compare(options)
    seconds["compare"] = round(time.perf_counter() - started, 1)
    seconds["total"] = round(time.perf_counter() - begin, 1)
    rows = [json.loads(line) for line in (HERE / "data" / "prompts_test.jsonl").read_text().splitlines()]
    asked = [row["prompt"] for row in rows[: len(before.texts) // 2] for _ in range(2)]
    console.print(f"asked:  {asked[0]}\nbefore: {before.texts[0]}\nafter:  {after.texts[0]}\n", markup=False)

    figures = {
        "kl": [before.kl, after.kl],
        "reward": [before.reward, after.reward],
        "quality": [before.quality, after.quality],
        "win_share": [win_share(again, before, asked), win_share(after, before, asked)],
    }
    named = {
        "kl": "KL from the fine-tuned model, nats an answer",
        "reward": "score of the reward model",
        "quality": "wishes met (rule), of 1",
        "win_share": "win share against the fine-tuned model",
    }
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "before PPO", "after PPO"):
        table.add_column(title, justify="left" if not title else "right")
    for key, (one, other) in figures.items():
        table.add_row(named[key], f"{one:.2f}", f"[bold]{other:.2f}")
    console.print(table)
    console.print("seconds: " + ", ".join(f"{stage} {spent:g}" for stage, spent in seconds.items()))
    path = Path(options.out) / "rlhf.json"
    result = {
        **figures,
        "seconds": seconds,
        "answers": {"prompts": asked, "before": before.texts, "after": after.texts},
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"figures: {path}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except fastpeft.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
