"""One stack's DPO steps, in a process of its own: builds the model, trains a few steps, prints one line of JSON.

Started by the suite ``dpo_step`` (``python -m bench.dpo '{"stack": ...}'``). All train LoRA on all seven projections of
a Llama of random weights with NF4 linear layers, the reference being the model without its adapter; a batch is pairs
whose answers share a prompt of half the tokens. Each stack's own trainer runs; a step is timed from its end to the next
one's.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from bench.case import PeerMissing
from bench.step import PROJECTIONS, Setup, empty_model, random_nf4, stdout_to_stderr, word_tokenizer

Row = dict[str, str]
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Training:
    """A trainer that is ready.

    Attributes:
        train: runs all steps.
        note: what a reader should know about this stack.
    """

    train: Callable[[], Any]
    note: str = ""


class Clock(TrainerCallback):
    """The time at the end of each step.

    Args:
        cuda: wait for the device.
    """

    def __init__(self, cuda: bool) -> None:
        self.times: list[float] = []
        self._cuda = cuda

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        if self._cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def pairs(setup: Setup) -> list[Row]:
    """Random pairs; each answer with its prompt has ``setup.tokens`` tokens, the end token included."""
    words = random.Random(setup.seed)

    def text(count: int) -> str:
        return " ".join(f"<t{words.randrange(4, setup.vocab)}>" for _ in range(count))

    prompt, answer = setup.tokens // 2, setup.tokens - setup.tokens // 2 - 1
    count = setup.batch * (setup.warmup + setup.steps)
    return [
        {"prompt": text(prompt), "chosen": " " + text(answer), "rejected": " " + text(answer)} for _ in range(count)
    ]


def fastpeft(setup: Setup, clock: Clock, folder: str) -> Training:
    """Our trainer over fused layers."""
    from fastpeft.methods import LoraConfig
    from fastpeft.models import accelerate
    from fastpeft.trainers import DPOConfig, DPOTrainer

    model = empty_model(setup, lambda linear: random_nf4(linear.out_features, linear.in_features, setup))
    accelerate(model, checkpointing=setup.checkpointing, activation_budget_gb=setup.budget_gb)
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=setup.batch,
        max_steps=setup.warmup + setup.steps,
        max_length=setup.tokens,
        learning_rate=LEARNING_RATE,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        progress=False,
    )
    trainer = DPOTrainer(
        model,
        None,
        args,
        pairs(setup),
        processing_class=word_tokenizer(setup),
        callbacks=[clock],
        peft_config=LoraConfig(r=setup.rank, lora_alpha=32, target_modules=list(PROJECTIONS)),
    )
    return Training(trainer.train, f"checkpointing {setup.checkpointing}, the prompt's work shared by a pair")


def run(setup: Setup) -> dict[str, Any]:
    """Build a stack and time its steps.

    Args:
        setup: what to run; ``batch`` counts pairs.
    Returns:
        ``status`` ok with ``seconds`` of each step after the warm-up, ``peak_bytes`` and ``note``; or ``not
        installed``, or ``failed`` with ``detail``.
    """
    from bench.peers import dpo as peers

    clock = Clock(setup.device == "cuda")
    try:
        with tempfile.TemporaryDirectory() as folder:
            stack = (fastpeft if setup.stack == "fastpeft" else peers.STACKS[setup.stack])(setup, clock, folder)
            if setup.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            stack.train()
    except PeerMissing as missing:
        return {"status": str(missing), "detail": ""}
    except Exception as error:  # whatever a stack raises belongs in its row
        said = str(error).strip().splitlines()
        return {"status": "failed", "detail": f"{type(error).__name__}: {said[0] if said else ''}"}
    seconds = [after - before for before, after in zip(clock.times[:-1], clock.times[1:], strict=True)]
    return {
        "status": "ok",
        "note": stack.note,
        "seconds": seconds[-setup.steps :],
        "peak_bytes": torch.cuda.max_memory_allocated() if setup.device == "cuda" else None,
    }


if __name__ == "__main__":
    with stdout_to_stderr():
        outcome = run(Setup(**json.loads(sys.argv[1])))
    print(json.dumps({"setup": sys.argv[1], **outcome}))
