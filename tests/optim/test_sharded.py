"""Parameters that are DTensors, as FSDP2 makes them: each process steps the part it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optim.problems import gradients, parameters
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastpeft.optim import AdamW, AdamW8bit, PagedAdamW

SHAPES = [(300, 70), (5,), (64, 65)]


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process, so that the part is the whole; the code path is that of several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("make", [AdamW, AdamW8bit, PagedAdamW], ids=lambda make: make.__name__)
def test_steps_and_state_of_sharded_parameters(make: Any, mesh: Any) -> None:
    plain = parameters("cpu", shapes=SHAPES)
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours, expected = make(sharded, **options), make(plain, **options)
    for step in range(3):
        gradients(plain, step)
        for p, q in zip(sharded, plain, strict=True):
            assert q.grad is not None
            p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)])
        ours.step()
        expected.step()
    for p, q in zip(sharded, plain, strict=True):
        assert isinstance(p, DTensor)
        assert torch.equal(p.full_tensor(), q)
    saved = ours.state_dict()["state"][0]
    assert all(isinstance(saved[key], DTensor) for key in saved if key in ("exp_avg", "exp_avg_sq"))


def test_clipping_by_the_norm_of_a_part_is_refused(mesh: Any) -> None:
    sharded = [nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)]))]
    with pytest.raises(ValueError, match=r"max_grad_norm with parameter 0 .* a DTensor; .*clip_grad_norm_ instead"):
        AdamW(sharded, max_grad_norm=1.0)
