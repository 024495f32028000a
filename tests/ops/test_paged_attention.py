"""Attention over pages, on every device, against attention over plain keys and values in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from blocks import DTYPES, dtype_id
from tolerances import assert_exact, assert_ratio
from torch import Tensor

from fastpeft import ops


@dataclass(frozen=True)
class Case:
    """Sizes of a batch: lengths are tokens before the new one, -1 for an idle row."""

    heads: int
    kv_heads: int
    dim: int
    lengths: tuple[int, ...]
    page_size: int = 16
    rotary: int = 0
    softcap: float = 0.0
    window: int = 0


CASES = {
    "llama": Case(32, 8, 128, (0, 1, 63, 64, 200), 64, 128),
    "smollm": Case(9, 3, 64, (17, 5, 130), rotary=64),
    "one-row-many-parts": Case(8, 2, 128, (1000,), 64, 128),
    "two-rows-one-short": Case(4, 4, 64, (900, 3), rotary=64),
    "idle-rows": Case(4, 2, 32, (-1, 40, -1), rotary=32),
    "multi-query": Case(20, 1, 64, (70, 33)),
    "share-of-seven": Case(14, 2, 64, (65, 257), rotary=64),
    "partial-rotary": Case(6, 2, 96, (31, 90), rotary=72),
    "dim-80": Case(4, 2, 80, (50,)),
    "softcap": Case(8, 4, 64, (100, 7), softcap=5.0),
    "window": Case(8, 4, 64, (100, 7, 31, 32, 300), window=32),
    "window-of-one": Case(2, 1, 32, (40,), window=1),
}


@dataclass
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    lengths: Tensor
    angles: tuple[Tensor, Tensor] | None

    def run(self, case: Case, **changes: Any) -> Tensor:
        given = {**vars(self), **changes}
        angles = given.pop("angles")
        return ops.paged_attention(
            **given, angles=angles, scale=case.dim**-0.5, softcap=case.softcap, window=case.window
        )


def batch(case: Case, dtype: torch.dtype, device: str) -> Batch:
    """Random rows whose pages are scattered; what no row owns is NaN, so that reading it shows."""
    rows, row_pages = len(case.lengths), max(case.lengths) // case.page_size + 1
    shape = (rows * row_pages + 3, case.kv_heads, case.page_size, case.dim)
    k_pages, v_pages = (torch.full(shape, math.nan, device=device, dtype=dtype) for _ in range(2))
    table = torch.randperm(shape[0])[: rows * row_pages].view(rows, row_pages).int()
    for row, length in enumerate(case.lengths):
        for token in range(length):
            page, offset = int(table[row, token // case.page_size]), token % case.page_size
            for pages in (k_pages, v_pages):
                pages[page, :, offset] = torch.randn(case.kv_heads, case.dim, device=device).to(dtype)
    # Views of a joint projection, whose rows are no multiple of a head apart.
    joint = torch.randn(rows, (case.heads + 2 * case.kv_heads) * case.dim, device=device).to(dtype)
    q, k, v = (
        part.unflatten(1, (-1, case.dim))
        for part in joint.split([case.heads * case.dim, case.kv_heads * case.dim, case.kv_heads * case.dim], 1)
    )
    phase = torch.rand(rows, case.rotary, device=device) * 2 * math.pi
    angles = (phase.cos().to(dtype), phase.sin().to(dtype)) if case.rotary else None
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return Batch(q, k, v, k_pages, v_pages, table.to(device), lengths, angles)


def expected(case: Case, b: Batch, dtype: torch.dtype) -> Tensor:
    """Row by row, with plain tensors, in ``dtype``; rotation as the fused op has it, rounded once."""
    q, k = b.q, b.k
    if b.angles is not None:
        q, k = (x[:, :, 0] for x in ops.rope(q[:, :, None], k[:, :, None], *(a[:, None] for a in b.angles)))
    out = torch.zeros(*b.q.shape, dtype=dtype, device=b.q.device)
    for row, length in enumerate(case.lengths):
        if length < 0:
            continue
        places = torch.arange(length, device=q.device)
        pages = b.table[row][places // case.page_size].long()
        keys, values = (
            torch.cat((x[pages, :, places % case.page_size], new[row][None])).to(dtype).transpose(0, 1)
            for x, new in ((b.k_pages, k), (b.v_pages, b.v))
        )
        share = case.heads // case.kv_heads
        keys, values = keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)
        if case.window:
            keys, values = keys[:, -case.window :], values[:, -case.window :]
        scores = (q[row][:, None].to(dtype) @ keys.transpose(1, 2)) * case.dim**-0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        out[row] = (scores.softmax(-1) @ values)[:, 0]
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_against_attention_over_plain_tensors(dtype: torch.dtype, case: Case, device: str) -> None:
    b = batch(case, dtype, device)
    reference, plain = expected(case, b, torch.float64), expected(case, b, dtype)
    out = b.run(case)
    assert_ratio(out, plain, reference)
    idle = [row for row, length in enumerate(case.lengths) if length < 0]
    assert not out[idle].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_key_and_value_join_their_page_and_nothing_else_changes(dtype: torch.dtype, device: str) -> None:
    case = Case(8, 2, 64, (20, 31, -1), rotary=64)
    b = batch(case, dtype, device)
    keys, values = b.k_pages.clone(), b.v_pages.clone()
    b.run(case)
    assert b.angles is not None
    _, rotated = ops.rope(b.q[:, :, None], b.k[:, :, None], *(a[:, None] for a in b.angles))
    for row, length in enumerate(case.lengths[:2]):
        page, offset = int(b.table[row, length // 16]), length % 16
        keys[page, :, offset], values[page, :, offset] = rotated[row, :, 0], b.v[row]
    assert_exact(b.k_pages.nan_to_num(7.0), keys.nan_to_num(7.0))
    assert_exact(b.v_pages.nan_to_num(7.0), values.nan_to_num(7.0))


def test_two_calls_give_equal_bits(device: str) -> None:
    case = CASES["one-row-many-parts"]
    b = batch(case, torch.bfloat16 if device == "cuda" else torch.float32, device)
    first = b.run(case)
    assert_exact(b.run(case), first)


def test_a_row_without_room(device: str) -> None:
    """On the CPU it is an error; on CUDA, where lengths are not known to the host, nothing is written."""
    case = Case(2, 1, 32, (15,))
    b = batch(case, torch.float32, device)
    b.lengths += 1
    before = b.k_pages.clone()
    if device == "cpu":
        with pytest.raises(ValueError, match=r"row 0 has 16 tokens; its 1 pages have no room"):
            b.run(case)
    else:
        assert not b.run(case).any()
    assert_exact(b.k_pages.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4, 1, 32)}, r"q has shape \(2, 4, 1, 32\); it must have 3 dimensions"),
        ({"v": torch.zeros(2, 1, 32)}, r"k \(2, 2, 32\) and v \(2, 1, 32\)"),
        ({"k_pages": torch.zeros(9, 2, 16, 16)}, r"pages have shapes .* they must be \(pages, 2, page_size, 32\)"),
        ({"table": torch.zeros(2, 1)}, "table is torch.float32 and lengths torch.int32; both must be int32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"lengths \(3,\); they must be \(2, row_pages\) and \(2,\)"),
        ({"q": torch.zeros(2, 4, 32).half()}, "must have one dtype"),
        ({"q": torch.zeros(2, 3, 32)}, "3 heads of q cannot share 2 heads of k"),
        ({"angles": (torch.zeros(2, 33), torch.zeros(2, 33))}, "cos and sin have 33 columns"),
        ({"angles": (torch.zeros(1, 32), torch.zeros(1, 32))}, r"both must be \(2, rotary\)"),
    ],
    ids=["q-dims", "v-heads", "pages", "table-dtype", "lengths", "dtype", "share", "rotary", "angle-rows"],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    case = Case(4, 2, 32, (3, 4))
    with pytest.raises(ValueError, match=message):
        batch(case, torch.float32, "cpu").run(case, **changes)


@pytest.mark.gpu
def test_replays_of_a_graph_follow_the_lengths() -> None:
    """A captured call is replayed with lengths that need more parts, and fewer, than when it was captured."""
    case = Case(8, 2, 64, (700,), 64, 64)
    b = batch(case, torch.bfloat16, "cuda")
    b.run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = b.run(case)
    for length in (3, 700, 64, 0):
        b.lengths.fill_(length)
        graph.replay()
        assert_exact(out, b.run(case))
