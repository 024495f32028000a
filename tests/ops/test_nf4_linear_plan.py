"""Which kernel takes an NF4 product: a pure function, so every regime is tested without its GPU."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from fastpeft.ops.native import _C, LinearPlan, dtype_number

# (compute capability, multiprocessors, shared memory a thread block may have, wgmma)
DEVICES = {
    "turing": (75, 68, 65_536, False),
    "a100": (80, 108, 166_912, False),
    "rtx3090": (86, 82, 101_376, False),
    "rtx4090": (89, 128, 101_376, False),
    "h100": (90, 132, 232_448, True),
    "h100-without-sm90a": (90, 132, 232_448, False),
}
HERE = {
    "m": 1,
    "n": 4096,
    "k": 4096,
    "transposed": False,
    "block_size": 64,
    "dtype": torch.bfloat16,
    "aligned": True,
    "device": "h100",
}


def plan(**changed: object) -> LinearPlan:
    case = {**HERE, **changed}
    return LinearPlan(
        *_C.nf4_linear_plan(
            case["m"],
            case["n"],
            case["k"],
            case["transposed"],
            case["block_size"],
            dtype_number("test", case["dtype"]),
            case["aligned"],
            *DEVICES[case["device"]],
        )
    )


@pytest.mark.parametrize("device", ["a100", "rtx3090", "rtx4090", "h100"])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16])
def test_few_tokens_are_read_from_the_codes(m: int, device: str) -> None:
    """Sixteen warps need 163 KB of shared memory for 8 tokens, all that an A100 has, and more above."""
    tiles = 1 if m <= 8 else 2
    warps = 16 if device == "h100" or (device == "a100" and tiles == 1) else 8
    reason = f"decode: {tiles} x 8 tokens, {warps} warps, {DEVICES[device][1]} blocks"
    chosen = plan(m=m, device=device)
    assert (chosen.kernel, chosen.workspace_bytes, chosen.counters, chosen.reason) == ("decode", 0, 0, reason)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"m": 16}, True),
        ({"m": 64}, True),
        ({"m": 64, "n": 1020}, False),
        ({"m": 4096}, False),
        ({"m": 1, "k": 4096 + 64}, False),
        ({"m": 64, "transposed": True}, False),
    ],
)
def test_which_products_can_be_added(changed: dict[str, object], expected: bool) -> None:
    assert plan(**changed).can_add == expected


def test_no_more_blocks_than_units_of_16_rows() -> None:
    assert plan(n=100).reason.endswith("7 blocks")


@pytest.mark.parametrize(
    ("changed", "tile"),
    [
        ({"m": 17}, "fragments: 128 x 32, clusters of 1"),
        ({"m": 64}, "fragments: 128 x 32, clusters of 1"),
        ({"m": 64, "n": 14336}, "fragments: 128 x 64, clusters of 1"),
        ({"m": 256, "n": 28672, "k": 8192}, "fragments: 128 x 256, clusters of 1"),
        ({"m": 1, "transposed": True}, "tiles: 128 x 32, clusters of 1"),
        ({"m": 64, "n": 14336, "transposed": True}, "tiles: 128 x 64, clusters of 1"),
        ({"m": 128, "n": 14336}, "tiles: 128 x 128, clusters of 1"),
        ({"m": 512}, "tiles: 128 x 128, clusters of 2"),
        ({"m": 1024}, "tiles: 128 x 256, clusters of 2"),
        ({"m": 8192, "transposed": True}, "tiles: 128 x 256, clusters of 2"),
    ],
    ids=str,
)
def test_more_tokens_go_by_wgmma_on_hopper(changed: dict[str, object], tile: str) -> None:
    chosen = plan(**changed)
    assert chosen.kernel == tile.split(":")[0]
    assert chosen.reason.startswith(f"{tile}, ")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"k": 96}, "k is 96, no multiple of 64"),
        ({"block_size": 32}, "block size 32, below 64"),
        ({"aligned": False}, "x or the codes are not aligned to 16 bytes"),
        ({"transposed": True, "n": 100}, "n is 100, no multiple of 8"),
        ({"n": 1 << 29, "k": 1024}, "more than 2^31 blocks of 64"),
        ({"m": 17, "device": "a100"}, "compute capability 80"),
        ({"m": 17, "device": "h100-without-sm90a"}, "compute capability 90, built without sm_90a"),
        ({"transposed": True, "device": "rtx4090"}, "compute capability 89"),
        ({"m": 4096, "n": 8192, "device": "a100"}, "compute capability 80"),
    ],
    ids=str,
)
def test_what_is_odd_goes_by_mma(changed: dict[str, object], reason: str) -> None:
    assert plan(**changed) == ("mma", 0, 0, False, f"mma: {reason}")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"m": 0}, "nothing to multiply"),
        ({"n": 0}, "nothing to multiply"),
        ({"k": 0}, "nothing to multiply"),
        ({"dtype": torch.float32}, "x is not of a 16-bit type"),
        ({"n": 1 << 34}, "a size of 2^30 or more"),
        ({"device": "turing"}, "compute capability 75, below 80"),
        ({"m": 4096, "device": "a100"}, "m is 4096, compute capability 80"),
        ({"m": 4096, "k": 4000}, "m is 4096, k is 4000, no multiple of 64"),
    ],
    ids=str,
)
def test_the_rest_is_dequantised_for_a_reason(changed: dict[str, object], reason: str) -> None:
    assert plan(**changed) == ("dequantise", 0, 0, False, f"dequantise: {reason}")


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (131072, 65536)], ids=str)
@pytest.mark.parametrize("m", [17, 64, 300, 1024, 4096, 65536])
def test_workspace_is_at_most_32_mb(m: int, shape: tuple[int, int], transposed: bool) -> None:
    chosen = plan(m=m, n=shape[0], k=shape[1], transposed=transposed)
    assert chosen.kernel in ("tiles", "fragments")
    assert chosen.workspace_bytes <= 32 << 20
    assert chosen.counters <= 2048


@pytest.mark.parametrize("sms", [132, 114, 78])
@pytest.mark.parametrize("depth", [64, 832, 4096, 14336])
@pytest.mark.parametrize("out", [8, 200, 4096, 28672])
@pytest.mark.parametrize("m", [1, 65, 300, 1024, 2304, 8192])
@pytest.mark.parametrize("forward", [True, False])
def test_tiles_cover_every_output_once(forward: bool, m: int, out: int, depth: int, sms: int) -> None:
    """Every chunk of every tile has one seat; the parts of a tile follow each other, in the workspace too."""
    tokens, cluster, chunks, items = _C.nf4_linear_tiles_items(m, out, depth, sms, forward)
    assert cluster * (1 + max(item[0] for item in items)) <= sms
    by_tile = sorted(items, key=lambda item: (item[1], item[2], item[3]))
    tiles = 0
    for (out0, m0), parts in groupby(by_tile, key=lambda item: item[1:3]):
        assert out0 % 128 == 0 and out0 < out
        assert m0 % (tokens * cluster) == 0 and m0 < m
        at = 0
        for number, (_, _, _, first, count, of, part, _, slot, last_slot) in enumerate(parts):
            assert (first, part) == (at, number)
            assert count > 0
            assert of == 1 or slot == last_slot - (of - 1) + part
            at += count
        assert at == chunks
        tiles += 1
    assert tiles == -(-out // 128) * -(-m // (tokens * cluster))
    slots = [item[8] for item in items if item[5] > 1]
    assert len(slots) == len(set(slots))
