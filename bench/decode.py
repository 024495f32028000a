"""One stack's greedy decoding, in a process of its own: builds the model once, times each batch, prints a line of JSON.

Started by the suite ``decode`` (``python -m bench.decode '{"stack": ...}'``). All decode with a Llama of random
weights, linear layers in NF4 with double quantisation and a bf16 head, with or without LoRA adapters beside them; a
time is that of prompts and new tokens together, as a user waits for it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import PeerMissing
from bench.step import Setup, empty_model, random_nf4, random_nf4_experts, stdout_to_stderr

Generate = Callable[[Tensor, int], Any]


@dataclass(frozen=True)
class DecodeSetup(Setup):
    """What is decoded.

    Attributes:
        batches: prompts at a time, each timed by itself.
        prompt_tokens: of each prompt.
        new_tokens: that each gets.
        adapter: LoRA of ``rank`` on all linear layers but the head, unmerged.
    """

    batches: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 128
    new_tokens: int = 64
    adapter: bool = False


@dataclass(frozen=True)
class Decoding:
    """A model that is ready to decode.

    Attributes:
        generate: from ``(b, t)`` tokens and a number of new ones; what it returns is not looked at.
        note: what a reader should know about this stack.
    """

    generate: Generate
    note: str = ""


def fastpeft(setup: DecodeSetup) -> Decoding:
    """The decoding engine over fused blocks."""
    from fastpeft.methods import LoraConfig, get_peft_model
    from fastpeft.models import accelerate
    from fastpeft.models.decode import DecodeEngine, DecodeOptions

    model = empty_model(
        setup,
        lambda linear: random_nf4(linear.out_features, linear.in_features, setup),
        lambda experts: random_nf4_experts(experts, setup),
    )
    accelerate(model.eval())
    if setup.adapter:
        model = get_peft_model(model, LoraConfig(r=setup.rank, lora_alpha=32, target_modules=setup.projections)).eval()
        shake_adapters(model)
    engine = DecodeEngine(model, max_batch=max(setup.batches))

    def generate(ids: Tensor, new_tokens: int) -> Any:
        return engine.generate(ids.tolist(), DecodeOptions(new_tokens))

    return Decoding(generate, "paged cache, CUDA graphs")


def shake_adapters(model: nn.Module) -> None:
    """Give up-projections, which begin at zero, values."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)


def run(setup: DecodeSetup) -> dict[str, Any]:
    """Build a stack and time its batches.

    Args:
        setup: what to run.
    Returns:
        ``status`` ok with ``batches``: for each ``batch``, ``seconds`` of all, ``prompt_seconds`` of a call for one new
        token, and ``peak_bytes``; or ``not installed``, or ``failed`` with ``detail``.
    """
    from bench.peers import decode as peers

    try:
        stack = (fastpeft if setup.stack == "fastpeft" else peers.STACKS[setup.stack])(setup)
        return {"status": "ok", "note": stack.note, "batches": [_measure(stack, b, setup) for b in setup.batches]}
    except PeerMissing as missing:
        return {"status": str(missing), "detail": ""}
    except Exception as error:  # whatever a stack raises belongs in its row
        said = str(error).strip().splitlines()
        return {"status": "failed", "detail": f"{type(error).__name__}: {said[0] if said else ''}"}


def _measure(stack: Decoding, batch: int, setup: DecodeSetup) -> dict[str, Any]:
    cuda = setup.device == "cuda"
    generator = torch.Generator().manual_seed(setup.seed)

    def seconds(new_tokens: int) -> float:
        ids = torch.randint(4, setup.vocab, (batch, setup.prompt_tokens), generator=generator).to(setup.device)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        stack.generate(ids, new_tokens)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(setup.warmup):
        seconds(setup.new_tokens)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    whole = [seconds(setup.new_tokens) for _ in range(setup.steps)]
    peak = torch.cuda.max_memory_allocated() if cuda else None
    seconds(1)
    prompts = [seconds(1) for _ in range(setup.steps)]
    result = {"batch": batch, "seconds": whole, "prompt_seconds": prompts, "peak_bytes": peak}
    if setup.profile and cuda and setup.stack == "fastpeft":
        result["kernels"] = _kernels_of_steps(lambda: seconds(setup.new_tokens))
    return result


def _kernels_of_steps(generate: Callable[[], Any]) -> list[dict[str, Any]]:
    """By kernel, the time from the end of the one before it to its own, over the second half of a call: the steps.

    Launches overlap, so that what a kernel takes by itself says little of what a step waits for it.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        generate()
        torch.cuda.synchronize()
    ends = sorted((e.time_range.end, e.name) for e in recorded.events() if e.device_type == DeviceType.CUDA)
    return path_by_kernel(ends[len(ends) // 2 :])


def path_by_kernel(ends: Sequence[tuple[float, str]]) -> list[dict[str, Any]]:
    """Microseconds up to each kernel's end since the one before, summed by name, the greatest first.

    Args:
        ends: when each kernel ended, in us and in order, and its name.
    """
    found: dict[str, dict[str, Any]] = {}
    for (before, _), (end, name) in pairwise(ends):
        row = found.setdefault(name, {"name": name, "calls": 0, "us": 0.0})
        row["calls"] += 1
        row["us"] += end - before
    return sorted(found.values(), key=lambda row: -row["us"])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    with stdout_to_stderr():
        outcome = run(DecodeSetup(**{**given, "batches": tuple(given["batches"])}))
    print(json.dumps({"setup": sys.argv[1], **outcome}))
