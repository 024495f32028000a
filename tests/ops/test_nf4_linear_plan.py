"""Which kernel takes an NF4 product: a pure function, so every regime is tested without its GPU."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops.native import _C, dtype_number

# (compute capability, multiprocessors, shared memory a thread block may have)
DEVICES = {
    "a100": (80, 108, 166_912),
    "rtx3090": (86, 82, 101_376),
    "rtx4090": (89, 128, 101_376),
    "h100": (90, 132, 232_448),
}
HERE = {"m": 1, "n": 4096, "k": 4096, "block_size": 64, "dtype": torch.bfloat16, "aligned": True, "device": "h100"}


def plan(**changed: object) -> tuple[bool, str]:
    case = {**HERE, **changed}
    return _C.nf4_linear_plan(
        case["m"],
        case["n"],
        case["k"],
        case["block_size"],
        dtype_number("test", case["dtype"]),
        case["aligned"],
        *DEVICES[case["device"]],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16])
def test_few_tokens_are_read_from_the_codes(m: int, device: str) -> None:
    """Sixteen warps need 148 KB of shared memory for up to 8 tokens and 165 KB above; an A100 has 163."""
    tiles = 1 if m <= 8 else 2
    warps = 16 if device == "h100" or (device == "a100" and tiles == 1) else 8
    assert plan(m=m, device=device) == (True, f"decode: {tiles} x 8 tokens, {warps} warps, {DEVICES[device][1]} blocks")


def test_no_more_blocks_than_units_of_16_rows() -> None:
    assert plan(n=100)[1].endswith("7 blocks")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"m": 17}, "m is 17, more than 16"),
        ({"m": 0}, "nothing to multiply"),
        ({"n": 0}, "nothing to multiply"),
        ({"k": 96}, "k is 96, no multiple of 64"),
        ({"block_size": 32}, "block size 32, below 64"),
        ({"dtype": torch.float32}, "x is not of a 16-bit type"),
        ({"aligned": False}, "x or the codes are not aligned to 16 bytes"),
        ({"n": 1 << 34}, "sizes beyond 32 bits"),
    ],
    ids=lambda value: "-".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else "",
)
def test_the_rest_is_dequantised_for_a_reason(changed: dict[str, object], reason: str) -> None:
    assert plan(**changed) == (False, f"dequantise: {reason}")
