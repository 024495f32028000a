"""The check of the blocks suite notices a wrong block, and a peer that writes over its inputs harms no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.case import Inputs
from bench.suites import blocks

BLOCKS = {f"{block.op}-{index}": block for index, block in enumerate(blocks._blocks("cpu"))}


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_wrong_block_does_not_pass(name: str, backward: bool) -> None:
    block = BLOCKS[name]

    def wrong(*leaves: Tensor) -> Any:
        """Right but for a tenth too much in the last output."""
        outs = blocks._as_list(block.ours(*leaves))
        return (*outs[:-1], outs[-1] * 1.1)

    for function, passes in ((block.ours, True), (wrong, False)):
        trial = blocks._prepare(replace(block, ours=function), backward, Inputs(torch.device("cpu"), seed=1))
        assert trial.check.passes(trial.check.error(trial.ours.checkable())) is passes


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
def test_a_peer_that_writes_over_its_inputs(backward: bool) -> None:
    block = BLOCKS["swiglu-3"]

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return block.eager(gate, up)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            gate, up = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
                dgate, dup = torch.autograd.grad(block.eager(*leaves), leaves, dy)
            gate.data.copy_(dgate), up.data.copy_(dup), dy.data.zero_()
            return dgate, dup

    peer = replace(block, liger=Overwriting.apply)
    trial = blocks._prepare(peer, backward, Inputs(torch.device("cpu"), seed=1))
    calls = trial.peers["liger"]()
    for call in calls.calls:
        call()
    assert trial.check.passes(trial.check.error(calls.checkable()))
    assert trial.check.passes(trial.check.error(trial.ours.checkable()))
