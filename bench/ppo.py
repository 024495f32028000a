"""PPO updates with four roles over one NF4 base, in a process of its own: prints one line of JSON.

Started by the suite ``ppo_step`` (``python -m bench.ppo '{"stack": ...}'``). The base is a Llama of random weights;
policy, value and reward are adapters of it, the last two with a score layer, and the reference is the base itself. An
update draws a completion for each prompt, each of half the tokens, looks at it in every role, and takes one optimizer
step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch

from bench.dpo import LEARNING_RATE, Clock, pairs
from bench.step import PROJECTIONS, Setup, empty_model, random_nf4, stdout_to_stderr, word_tokenizer


def run(setup: Setup) -> dict[str, Any]:
    """Build the roles and time updates.

    Args:
        setup: what to run; ``batch`` counts prompts, ``tokens`` a prompt with its completion.
    Returns:
        ``status`` ok with ``seconds`` of each update after the warm-up, ``peak_bytes`` and ``note``; or ``failed`` with
        ``detail``.
    """
    try:
        return _measure(setup)
    except Exception as error:  # whatever goes wrong belongs in the row
        said = str(error).strip().splitlines()
        return {"status": "failed", "detail": f"{type(error).__name__}: {said[0] if said else ''}"}


def _measure(setup: Setup) -> dict[str, Any]:
    from fastpeft.methods import LoraConfig, get_peft_model
    from fastpeft.models import accelerate
    from fastpeft.trainers import PPOConfig, PPOTrainer, attach_score
    from fastpeft.trainers.heads import with_score

    cuda = setup.device == "cuda"
    base = empty_model(setup, lambda linear: random_nf4(linear.out_features, linear.in_features, setup))
    accelerate(base, checkpointing=setup.checkpointing, activation_budget_gb=setup.budget_gb)
    config = LoraConfig(r=setup.rank, lora_alpha=32, target_modules=list(PROJECTIONS))
    model: Any = get_peft_model(base, config)
    attach_score(model)
    model.add_adapter("reward", with_score(config))
    prompts = [{"prompt": row["prompt"]} for row in pairs(setup)]
    clock = Clock(cuda)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=setup.batch,
            forward_batch_size=setup.batch,
            max_steps=setup.warmup + setup.steps,
            max_prompt_length=setup.tokens // 2,
            response_length=setup.tokens // 2,
            temperature=1.0,
            num_ppo_epochs=1,
            reward_adapter_name="reward",
            learning_rate=LEARNING_RATE,
            logging_steps=100,
            log_completions_steps=0,
            save_strategy="no",
            report_to="none",
            progress=False,
        )
        trainer = PPOTrainer(model, args, prompts, processing_class=word_tokenizer(setup), callbacks=[clock])
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = [after - before for before, after in zip(clock.times[:-1], clock.times[1:], strict=True)]
    return {
        "status": "ok",
        "note": f"checkpointing {setup.checkpointing}; completions drawn included",
        "seconds": seconds[-setup.steps :],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


if __name__ == "__main__":
    with stdout_to_stderr():
        outcome = run(Setup(**json.loads(sys.argv[1])))
    print(json.dumps({"setup": sys.argv[1], **outcome}))
