"""Keys and values into pages, on every device, against torch's own indexing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from blocks import DTYPES, dtype_id
from tolerances import assert_exact
from torch import Tensor

from fastpeft.ops import paged_store_

SIZES = {  # kv_heads, tokens, d, page_size
    "llama": (8, 300, 128, 64),
    "smollm": (3, 77, 64, 16),
    "one-token": (2, 1, 32, 64),
    "no-token": (2, 0, 32, 64),
    "odd-head": (2, 40, 37, 16),
    "one-head-of-one": (1, 9, 1, 4),
}


def batch(
    kv_heads: int, tokens: int, dim: int, page_size: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Views of a joint projection, pages of NaN, and scattered places, of which every fifth is padding."""
    joint = torch.randn(tokens, 2 * kv_heads * dim, device=device).to(dtype)
    k, v = (part.unflatten(1, (-1, dim)).transpose(0, 1) for part in joint.split(kv_heads * dim, 1))
    count = tokens // page_size + 3
    k_pages, v_pages = (
        torch.full((count, kv_heads, page_size, dim), math.nan, device=device, dtype=dtype) for _ in range(2)
    )
    place = torch.randperm(count * page_size)[:tokens]
    pages = torch.where(torch.arange(tokens) % 5 == 3, -1, place // page_size)
    return k, v, k_pages, v_pages, pages.int().to(device), (place % page_size).int().to(device)


def expected(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor, offsets: Tensor) -> list[Tensor]:
    stored = pages >= 0
    made = []
    for x, into in ((k, k_pages.clone()), (v, v_pages.clone())):
        into[pages[stored].long(), :, offsets[stored].long()] = x[:, stored].transpose(0, 1)
        made.append(into)
    return made


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_against_indexing(dtype: torch.dtype, sizes: tuple[int, int, int, int], device: str) -> None:
    given = batch(*sizes, dtype, device)
    wanted = expected(*given)
    paged_store_(*given)
    for found, pages in zip(given[2:4], wanted, strict=True):
        assert_exact(found.nan_to_num(7.0), pages.nan_to_num(7.0))


@pytest.mark.parametrize("layout", ["contiguous", "off-the-grid", "strided-elements"])
def test_any_layout(layout: str, device: str) -> None:
    """k and v of their own layouts; one that starts between 16-byte borders; elements that are apart."""
    k, v, *rest = batch(2, 50, 64, 16, torch.bfloat16, device)
    if layout == "contiguous":
        k = k.contiguous()
    elif layout == "off-the-grid":
        k = torch.cat((torch.zeros(1, device=device), k.flatten())).to(k.dtype)[1:].view(k.shape)
    else:
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = expected(k, v, *rest)
    paged_store_(k, v, *rest)
    for found, pages in zip(rest[:2], wanted, strict=True):
        assert_exact(found.nan_to_num(7.0), pages.nan_to_num(7.0))


@pytest.mark.parametrize(("page", "offset"), [(6, 0), (1, 16), (1, -1)])
def test_a_place_that_is_not_there(page: int, offset: int, device: str) -> None:
    """On the CPU it is an error; on CUDA, where places are not known to the host, nothing is written."""
    k, v, k_pages, v_pages, pages, offsets = batch(2, 50, 32, 16, torch.float32, device)
    pages.fill_(-1)
    pages[4], offsets[4] = page, offset
    if device == "cpu":
        with pytest.raises(ValueError, match=f"token 4 goes to place {offset} of page {page}; there are 6 pages of 16"):
            paged_store_(k, v, k_pages, v_pages, pages, offsets)
    else:
        paged_store_(k, v, k_pages, v_pages, pages, offsets)
    assert bool(k_pages.isnan().all()) and bool(v_pages.isnan().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 5)}, r"k has shape \(2, 5\) and v \(2, 5, 32\)"),
        ({"v": torch.zeros(1, 5, 32)}, r"k has shape \(2, 5, 32\) and v \(1, 5, 32\)"),
        ({"k_pages": torch.zeros(3, 2, 16, 16)}, r"they must be \(pages, 2, page_size, 32\)"),
        ({"pages": torch.zeros(5, dtype=torch.int64)}, r"pages is torch.int64 .* must be torch.int32, \(5,\)"),
        ({"offsets": torch.zeros(4, dtype=torch.int32)}, r"offsets is torch.int32 of shape \(4,\)"),
        ({"k": torch.zeros(2, 5, 32).half()}, "must have one dtype"),
    ],
    ids=["k-dims", "v-heads", "pages", "int64", "offsets", "dtype"],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    names = ("k", "v", "k_pages", "v_pages", "pages", "offsets")
    given = dict(zip(names, batch(2, 5, 32, 16, torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        paged_store_(**{**given, **changes})
    transposed = given["k_pages"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="pages must be contiguous"):
        paged_store_(**{**given, "k_pages": transposed})
