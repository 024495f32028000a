"""Peak memory of training steps beside what ``fastpeft estimate`` says, in a process of its own: prints a line of JSON.

Started by the suite ``memory`` (``python -m bench.memory '{"method": ...}'``), once for each method. The model is made
once; then come the lengths, the shortest first, so that nothing that grows with the length is left from a longer one.
On a GPU the measure is what torch's allocator gave out; on a CPU it is the tensors (`bench.tensor_memory`), so memory
within an op is not seen, and the estimate leaves it out too.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from bench.step import Setup, empty_model, random_nf4, stdout_to_stderr
from bench.tensor_memory import TensorMemory

LEARNING_RATE = 1e-4
_OF_SIZE = "8B"  # any size: the options of the command line need one, and the shape is the setup's


@dataclass(frozen=True)
class MemorySetup(Setup):
    """What is trained.

    Attributes:
        method: as ``fastpeft estimate --method`` has it.
        lengths: tokens of a row, virtual ones included; each is measured by itself.
    """

    method: str = "qlora"
    lengths: tuple[int, ...] = (512, 2048, 8192)


class Memory(Protocol):
    """Bytes of a device.

    Attributes:
        alive: now.
        peak: the most at once since the last ``reset``.
    """

    @property
    def alive(self) -> int: ...

    @property
    def peak(self) -> int: ...

    def reset(self) -> None: ...


class CudaMemory:
    """What torch's allocator has given out."""

    @property
    def alive(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def run(setup: MemorySetup) -> dict[str, Any]:
    """Build the model and train it at each length.

    Args:
        setup: what to run.
    Returns:
        ``status`` ok with ``cases``, a dictionary of `_case` for each length; or ``failed`` with ``detail``.
    """
    try:
        return {"status": "ok", "cases": _cases(setup)}
    except Exception as error:  # whatever goes wrong belongs in the row
        return _failure(error)


def _failure(error: Exception) -> dict[str, Any]:
    said = str(error).strip().splitlines()
    return {"status": "failed", "detail": f"{type(error).__name__}: {said[0] if said else ''}"}


def _cases(setup: MemorySetup) -> list[dict[str, Any]]:
    from fastpeft.optim import AdamW
    from fastpeft.recipes.estimate_model import shape_of
    from fastpeft.recipes.estimate_report import setting_of_options

    cuda = setup.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)  # products this small are slower in two
    _, setting = setting_of_options(
        None, _OF_SIZE, setup.method, rank=setup.rank, batch=setup.batch, checkpointing=setup.checkpointing
    )
    setting = replace(setting, device=setup.device)
    shape = shape_of(setup.model_config(), setup.method)
    model = build(setup, setting)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    cases = []
    with _watching(model, cuda) as memory:
        for length in sorted(setup.lengths):
            cases.append(_case(setup, shape, replace(setting, length=length), model, optimizer, memory))
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    return cases


def build(setup: Setup, setting: Any) -> nn.Module:
    """A Llama of random weights as an estimate's setting has it: NF4 or dense bf16, accelerated, with the method.

    Args:
        setup: its shape and device.
        setting: of `fastpeft.recipes.estimate`.
    """
    from fastpeft.methods import get_peft_model
    from fastpeft.models import accelerate

    def layer(linear: nn.Linear) -> nn.Module:
        return random_nf4(linear.out_features, linear.in_features, setup) if setting.quantize else linear

    base = empty_model(setup, layer)
    accelerate(base, checkpointing=setting.checkpointing)
    model: nn.Module = get_peft_model(base, setting.method)
    return model.train()


@contextmanager
def _watching(model: nn.Module, cuda: bool) -> Iterator[Memory]:
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        yield CudaMemory()
        return
    with TensorMemory() as memory:
        memory.count(*model.parameters(), *model.buffers())
        yield memory


def _case(
    setup: MemorySetup, shape: Any, setting: Any, model: nn.Module, optimizer: torch.optim.Optimizer, memory: Memory
) -> dict[str, Any]:
    """Train at one length.

    Returns:
        ``tokens``; ``predicted``, ``when`` and ``moments`` of the estimate, on a CPU without what is within an op;
        ``status`` ok with ``measured``, the same of each phase of a step in ``phases``, and ``steady``, what is left
        between steps; or ``failed`` with ``detail``.
    """
    from fastpeft.ops.linear_loss import chunk_rows
    from fastpeft.recipes.estimate import estimate

    found = estimate(shape, setting)
    moments = dict(found.moments)
    if setup.device == "cpu":
        moments = {name: size + found.activations_host for name, size in moments.items()}  # host memory is tensors too
        logits = setting.itemsize * shape.vocabulary
        moments["the loss"] -= logits * chunk_rows(setting.batch * setting.length, logits, "cpu")
    when = max(moments, key=lambda name: moments[name])
    case = {"tokens": setting.length, "predicted": moments[when], "when": when, "moments": moments}
    try:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if trainable != found.trained.numbers:
            raise RuntimeError(f"{trainable} numbers train, and the estimate is for {found.trained.numbers}")
        phases = _train(setup, setting.length - found.trained.virtual_tokens, model, optimizer, memory)
    except Exception as error:  # out of memory: the row says so
        return {**case, **_failure(error)}
    return {**case, "status": "ok", "measured": max(phases.values()), "phases": phases, "steady": memory.alive}


def _train(
    setup: MemorySetup, tokens: int, model: nn.Module, optimizer: torch.optim.Optimizer, memory: Memory
) -> dict[str, int]:
    """The most bytes at once in forward, backward and the optimizer's step, over ``setup.steps`` steps."""
    if tokens < 2:
        raise ValueError(f"{tokens} tokens of text beside the virtual ones have nothing to predict")
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(setup.seed)
    ids = torch.randint(4, setup.vocab, (setup.batch, tokens), generator=generator).to(setup.device)
    phases = dict.fromkeys(("forward", "backward", "step"), 0)

    def end(phase: str) -> None:
        phases[phase] = max(phases[phase], memory.peak)
        memory.reset()

    memory.reset()
    for _ in range(setup.steps):
        loss = model(input_ids=ids, labels=ids).loss
        end("forward")
        loss.backward()
        end("backward")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end("step")
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"the loss is {float(loss)}")
    return phases


if __name__ == "__main__":
    with stdout_to_stderr():
        outcome = run(MemorySetup(**json.loads(sys.argv[1])))
    print(json.dumps({"setup": sys.argv[1], **outcome}))
