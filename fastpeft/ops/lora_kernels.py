"""The kernels of LoRA linears that share x, over NF4 bases (csrc/include/fastpeft/lora.h).

Forward, a pass over x gives the xa of all adapters, and each output is one product that its adapter joins. Backward, a
pass over each dy gives dxa and dB, one over x gives all dA, and each product adds its share to dx. Partial sums of the
passes lie where dx is written afterwards. Without dropout, what costs less so is made by a few thread blocks beside the
products instead (`native.LoraPlan`).

xa and dxa have their ranks rounded up to a multiple of 8, and lie side by side: ``(m, sum of padded ranks)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.nf4 import product_from_codes
from fastpeft.ops.nf4_weight import Operands


class Member(NamedTuple):
    """One of the linear layers that share x."""

    base: tuple[Any, ...]  # as in `Operands`; of a dense weight the weight, four None and 0
    n: int
    a: Tensor  # (r, k)
    b: Tensor  # (n, r)
    scale: float

    @property
    def operands(self) -> Operands:
        """Of the NF4 base."""
        codes, absmax, nested_absmax, nested_map, offset, block_size = self.base
        return codes, absmax, nested_absmax, nested_map, offset, block_size

    @property
    def is_nf4(self) -> bool:
        """Whether the base is quantised."""
        return self.base[1] is not None


class Group(NamedTuple):
    """The layers, and the dropout before their adapters."""

    members: list[Member]
    k: int
    p: float
    seed: Tensor | None

    @property
    def padded_ranks(self) -> list[int]:
        """Columns of xa of each member."""
        return [padded_rank(member.a.shape[0]) for member in self.members]


def padded_rank(r: int) -> int:
    """Columns of xa of an adapter."""
    return -(-r // 8) * 8


def plan(group: Group, *activations: Tensor) -> native.LoraPlan:
    """Whether the kernels take a group.

    Args:
        group: the layers.
        activations: all that is read, contiguous; the first one is ``(m, k)``.
    """
    x2d, members = activations[0], group.members
    if not x2d.is_cuda:
        return _composed("on the CPU")
    if not all(member.is_nf4 for member in members):
        return _composed("a dense base")
    tensors = (*activations, *(member.base[0] for member in members))
    return native.lora_linear_plan(
        x2d.shape[0],
        group.k,
        tuple(member.n for member in members),
        tuple(member.a.shape[0] for member in members),
        tuple(member.base[-1] for member in members),
        x2d.dtype,
        all(tensor.data_ptr() % 16 == 0 for tensor in tensors),
        all(factor.data_ptr() % 16 == 0 for member in members for factor in (member.a, member.b)),
        group.p,
        x2d.device,
    )


def _composed(reason: str) -> native.LoraPlan:
    return native.LoraPlan(False, False, False, (), False, False, 0, 0, 0, 0, 0, 0, 0, f"composed: {reason}")


def _masters(group: Group) -> list[tuple[Tensor, Tensor]]:
    """A and B as the kernels read them; no copies in the usual case."""
    return [(member.a.float().contiguous(), member.b.float().contiguous()) for member in group.members]


def _adapters(group: Group, masters: Sequence[tuple[Tensor, Tensor]]) -> list[object]:
    return [native.lora_adapter(a, b, member.scale) for member, (a, b) in zip(group.members, masters, strict=True)]


def _starts(begin: int, sizes: Sequence[int]) -> list[int]:
    """Places of pieces of memory that follow each other, and the end."""
    starts = [begin]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts


def forward(
    x2d: Tensor, group: Group, biases: Sequence[Tensor | None], needs: native.LoraPlan, rows: Sequence[int]
) -> list[Tensor]:
    """Compute the outputs and xa.

    Args:
        x2d: contiguous ``(m, k)``.
        group: the layers.
        biases: ``(n,)`` each or None.
        needs: the plan.
        rows: shape of x without its last size.
    Returns:
        ``(*rows, n)`` of each member, and xa.
    """
    m, k, dtype = *x2d.shape, native.dtype_number("lora_linear", x2d.dtype)
    ranks = group.padded_ranks
    masters = _masters(group)
    rounded = 0 if needs.xa_beside else sum(ranks) * k
    scratch = x2d.new_empty((rounded + (needs.xa_bytes + needs.forward_bytes) // 2,))
    xa = x2d.new_empty((m, sum(ranks)))
    ys = [x2d.new_empty((*rows, member.n)) for member in group.members]
    counters = native.counters(needs.counters, x2d.device)

    a16, beside, workspace = _starts(scratch.data_ptr(), [2 * rounded, needs.xa_bytes])[:3]
    seed = 0 if group.seed is None else int(group.seed)
    adapters = _adapters(group, masters)
    if not needs.xa_beside:
        native.call_cuda("lora_project", x2d, x2d.data_ptr(), dtype, m, k, adapters, a16, xa.data_ptr(), group.p, seed)
    column = xa.data_ptr()
    for i, (member, rank, y, bias) in enumerate(zip(group.members, ranks, ys, biases, strict=True)):
        # The first product starts while xa is made, which it needs last.
        adapter = native.linear_adapter(
            column, sum(ranks), masters[i][1], member.a.shape[0], member.scale, early=i == 0 and not needs.xa_beside
        )
        if i == 0 and needs.beside and group.p == 0:
            adapter.make_xa(adapters, beside)
        bias = None if bias is None else bias.contiguous()
        product_from_codes(
            x2d, member.operands, member.n, k, False, bias, y, workspace, needs.forward_bytes, counters, adapter
        )
        column += 2 * rank
    return [*ys, xa]


def backward(
    dys2d: Sequence[Tensor],
    x2d: Tensor,
    xa: Tensor,
    group: Group,
    needs: native.LoraPlan,
    want_dx: bool,
    want_dab: bool,
    shape: Sequence[int],
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Compute the gradients.

    Args:
        dys2d: contiguous ``(m, n)`` of each member.
        x2d: contiguous ``(m, k)``.
        xa: as the forward gave it.
        group: the layers.
        needs: the plan.
        want_dx: compute the gradient by x.
        want_dab: compute those by A and B.
        shape: of x.
    Returns:
        The gradient by x or None, those by A, and those by B; without ``want_dab`` what these hold is undefined.
    """
    m, k, dtype = *x2d.shape, native.dtype_number("lora_linear", x2d.dtype)
    ranks = group.padded_ranks
    total = sum(ranks)
    masters = _masters(group)
    made_here = (
        needs
        if want_dx
        else needs._replace(beside=False, dxa_beside=[False] * len(ranks), da_beside=False, da_after=False)
    )
    # Partial sums of the passes are added up before dx is written, so they lie in its memory, which they seldom exceed.
    sums = x2d.new_empty((max(m * k if want_dx else 0, needs.sums_bytes // 2),))
    scratch = x2d.new_empty((m * total + ((needs.dxa_bytes + needs.backward_bytes) // 2 if want_dx else 0),))
    das = [torch.empty_like(a) for a, _ in masters]
    dbs = [torch.empty_like(b) for _, b in masters]
    counters = native.counters(needs.counters, x2d.device)

    seed = 0 if group.seed is None else int(group.seed)
    space = (sums.data_ptr(), needs.sums_bytes)
    dxa, beside, workspace = _starts(scratch.data_ptr(), [2 * m * total, needs.dxa_bytes])[:3]
    first = _starts(0, ranks)
    adapters = _adapters(group, masters)
    low_rank = [(xa.data_ptr() + 2 * begin, total, dxa + 2 * begin, total) for begin in first]
    for i, adapter in enumerate(adapters):
        if not made_here.dxa_beside[i]:
            of_dy = (dys2d[i].data_ptr(), dtype, m, adapter, *low_rank[i], dbs[i].data_ptr())
            native.call_cuda("lora_backward", x2d, *of_dy, *space)
    gradients = [da.data_ptr() for da in das], [da.shape[0] for da in das]
    of_x = (x2d.data_ptr(), dtype, m, k, dxa, *gradients, group.p, seed)
    if want_dab and not made_here.da_beside and not made_here.da_after:
        native.call_cuda("lora_gradient", x2d, *of_x, *space, counters.data_ptr())
    if not want_dx:
        return None, das, dbs
    dx = sums[: m * k].view(shape)
    # The longest product comes last: it leaves most time for dA beside it.
    longest = max(range(len(ranks)), key=lambda i: group.members[i].n)
    order = [i for i in range(len(ranks)) if i != longest] + [longest]
    for i in order:
        member, a = group.members[i], masters[i][0]
        xa_at, _, dxa_at, _ = low_rank[i]
        joined = native.linear_adapter(dxa_at, total, a, a.shape[0], p=group.p, seed=seed, add_to_y=i != order[0])
        if made_here.beside and (i == longest or made_here.da_beside or group.p > 0):
            joined.make_dxa(adapters[i], xa_at, total, dbs[i].data_ptr(), beside)
        if made_here.beside and i == longest and group.p == 0:
            joined.make_da(x2d.data_ptr(), dxa, *gradients)
        product_from_codes(
            dys2d[i], member.operands, member.n, k, True, None, dx, workspace, needs.backward_bytes, counters, joined
        )
    if want_dab and made_here.da_after:
        after = x2d.new_empty((needs.after_bytes // 2,))
        native.call_cuda("lora_gradient", x2d, *of_x, after.data_ptr(), needs.after_bytes, counters.data_ptr())
    return dx, das, dbs
