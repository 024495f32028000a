"""One AdamW step whose state lies on the device and on the host, in several shares.

The floor of a row is the slower of two: what the device's memory has to carry (parameters, gradients, state that is
near, and state that is far twice, as it passes through slots), and what the link has to carry each way. bitsandbytes'
paged optimizer cannot be told where its state should be: it pages it in and, as there is room, leaves it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.case import Case, Check, Inputs, Suite, Trial, Work
from bench.peers import bnb
from bench.suites import adamw
from fastpeft.optim import PagedAdamW, PagedAdamW8bit

_SHARES = (0, 25, 50, 75, 100)  # per cent of the state that may be on the device
_STATE_BYTES = {32: 8.0, 8: 2 + 8 / 256}  # a parameter
_OURS = {32: PagedAdamW, 8: PagedAdamW8bit}
_PEERS = {32: "PagedAdamW32bit", 8: "PagedAdamW8bit"}
_EAGER = "steps that stream state from the host are not captured"
_RESIDENT = "its state stays on the device once it is there: nothing is paged"


def _prepare(numel: int, dtype: torch.dtype, bits: int, share: int, inputs: Inputs) -> Trial:
    state = round(numel * _STATE_BYTES[bits])
    near = state * share // 100
    note = "on a CPU all state is in its memory"
    if inputs.device.type == "cuda":
        _check_memory(state, numel * dtype.itemsize, inputs.device)
        note = ""
    start = [inputs.randn(numel, dtype=dtype, scale=adamw.PARAM_SCALE)]
    grads = [inputs.randn(numel, dtype=dtype)]

    def ours(params: Sequence[nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
        budget = near if share < 100 else None  # the last page of an arena is seldom full
        return _OURS[bits](params, device_budget_bytes=budget, **hyper)

    tolerance = adamw.EIGHT_BIT_TOLERANCE if bits == 8 else adamw.BNB_TOLERANCES[dtype]
    far = state - near
    return Trial(
        ours=adamw.contender(ours, start, grads, note, _EAGER),
        peers={
            "bnb": lambda: adamw.contender(
                bnb.adamw(_PEERS[bits]), start, grads, note=_RESIDENT, eager_because="it waits for every tensor"
            )
        },
        work=Work(bytes=3 * numel * dtype.itemsize + 2 * near + 4 * far, memory="copy", link_bytes=far),
        check=Check(partial(adamw.update_error, start, grads), tolerance, "relative error of the update"),
    )


def _check_memory(state: int, param: int, device: torch.device) -> None:
    """Never more managed memory than the card has free: that of both contenders, beside their parameters."""
    free, needed = torch.cuda.mem_get_info(device)[0], 2 * state + 8 * param
    if needed > free:
        raise RuntimeError(f"it needs {needed / 1e9:.3g} GB of device memory, and {free / 1e9:.3g} GB are free")


def _cases(device_type: str) -> list[Case]:
    cuda = device_type == "cuda"
    sizes_of = [(1 << 26, True), (1 << 29, False)] if cuda else [(1 << 20, True)]
    cases = []
    for numel, quick in sizes_of:
        for bits, dtype, shares in ((32, torch.float32, _SHARES), (8, torch.bfloat16, (0, 50))):
            for share in shares:
                sizes: dict[str, int | float | str] = {"bits": bits, "params": f"{numel >> 20}M", "near": f"{share}%"}
                prepare = partial(_prepare, numel, dtype, bits, share)
                cases.append(Case("paged_adamw", sizes, dtype, prepare, quick and share in (0, 50)))
    return cases


SUITE = Suite("paged_adamw", "one AdamW step with part of its state on the host", ("bnb",), _cases)
