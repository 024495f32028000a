"""The language-model head with its loss, forward and backward, and what it allocates.

``loss`` is the mean cross-entropy with a frozen or a trainable head; ``logprobs`` is a log-probability a token with any
gradient a token, as DPO and PPO need it, frozen. ``products`` is the bare matmuls of the head, whole: logits, gradient
by the hidden states and, for a trainable head, by the weight. It computes no loss and is the floor of all others.
``torch`` makes the logits, in float32 for the loss, as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench import reference
from bench.case import Calls, Case, Inputs, PeerMissing, Suite, Trial, Work
from bench.peers import liger
from bench.timing import forward_backward
from fastpeft.ops import linear_cross_entropy, linear_logprobs

# tokens, hidden size, vocabulary: Llama 3 8B and SmolLM2.
_SHAPES = {"cuda": ((8192, 4096, 128_256), (4096, 2048, 49_152)), "cpu": ((128, 64, 1003),)}
_TOLERANCE = 2e-2
_CHECKED_ROWS = 64  # of the bare products

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Operands:
    """Inputs of one call; ``grad`` is the gradient of what the call returns."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    grad: Tensor

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]

    @property
    def token_grad(self) -> Tensor:
        """Gradient of each token's cross-entropy: that of its log-probability, negated, or its share of the mean."""
        if self.grad.dim():
            return -self.grad
        return (self.grad / len(self.target)).expand(len(self.target))


def _calls(loss: Loss, sets: Sequence[_Operands]) -> Calls:
    return Calls([forward_backward(partial(loss, o.hidden, o.weight, o.target), o.trained, o.grad) for o in sets])


def _products(sets: Sequence[_Operands]) -> Calls:
    """The head's matmuls alone, the gradient by the logits being the logits themselves."""

    def call(hidden: Tensor, weight: Tensor, trainable: bool) -> list[Tensor]:
        logits = hidden @ weight.T
        return [logits, logits @ weight] + ([logits.T @ hidden] if trainable else [])

    operands = [(o.hidden.detach(), o.weight.detach(), o.weight.requires_grad) for o in sets]
    hidden, weight, trainable = operands[0]

    def some_rows() -> list[Tensor]:
        return [out[:_CHECKED_ROWS].clone() for out in call(*operands[0])]

    def reference_rows() -> list[Tensor]:
        h, w = hidden.double(), weight.double()
        first = h[:_CHECKED_ROWS] @ w.T
        return [first, first @ w] + ([(h @ w[:_CHECKED_ROWS].T).T @ h] if trainable else [])

    return Calls(
        [partial(call, *o) for o in operands],
        outputs=some_rows,
        note="the matmuls alone",
        check=reference.close_to(reference_rows, _TOLERANCE),
    )


def _torch_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), target)


def _torch_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -functional.cross_entropy(functional.linear(hidden, weight).float(), target, reduction="none")


def _liger_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return liger.linear_cross_entropy(hidden, weight, target, "mean")


def _liger_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -liger.linear_cross_entropy(hidden, weight, target, "none")


def _reference(o: _Operands) -> list[Tensor]:
    losses, dhidden, dweight = reference.head_loss(o.hidden, o.weight, o.target, o.token_grad)
    out = -losses if o.grad.dim() else losses.mean()
    return [out, dhidden, dweight][: 1 + len(o.trained)]


def _prepare(op: str, m: int, k: int, v: int, head: str, inputs: Inputs) -> Trial:
    trainable = head == "trainable"
    io_bytes = 2 * (2 * m * k + v * k * (2 if trainable else 1))

    def operands() -> _Operands:
        hidden = inputs.randn(m, k).requires_grad_()
        weight = inputs.randn(v, k, scale=2 * k**-0.5).requires_grad_(trainable)
        grad = inputs.randn(*((m,) if op == "logprobs" else ()), dtype=torch.float32)
        return _Operands(hidden, weight, inputs.integers(v, m), grad if op == "logprobs" else torch.ones_like(grad))

    sets = [operands() for _ in range(inputs.sets(io_bytes))]
    contenders: dict[str, tuple[Loss, Loss, Loss]] = {
        "loss": (linear_cross_entropy, _torch_loss, _liger_loss),
        "logprobs": (linear_logprobs, _torch_logprobs, _liger_logprobs),
    }
    ours, plain, fused = contenders[op]

    def liger_calls() -> Calls:
        if inputs.device.type != "cuda":
            raise PeerMissing("needs a GPU")
        return _calls(fused, sets)

    return Trial(
        ours=_calls(ours, sets),
        peers={
            "products": lambda: _products(sets),
            "torch": lambda: _calls(plain, sets),
            "liger": liger_calls,
        },
        work=Work(bytes=io_bytes, flops=2 * (3 if trainable else 2) * m * k * v, memory="copy"),
        check=reference.close_to(lambda: _reference(sets[0]), _TOLERANCE),
    )


def _cases(device_type: str) -> list[Case]:
    return [
        Case(
            op,
            {"m": m, "k": k, "v": v, "head": head},
            torch.bfloat16,
            partial(_prepare, op, m, k, v, head),
            quick=op == "loss" and head == "frozen",
            show_memory=True,
        )
        for m, k, v in _SHAPES[device_type]
        for op, head in (("loss", "frozen"), ("loss", "trainable"), ("logprobs", "frozen"))
    ]


SUITE = Suite(
    "loss",
    "linear head and its loss, forward and backward (products: the matmuls alone)",
    ("products", "torch", "liger"),
    _cases,
)
