"""Which calls the LoRA kernels for few tokens take: a pure function, without a GPU."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops.native import lora_few_floats


def floats(
    m: int = 4,
    k: int = 4096,
    ranks: tuple[int, ...] = (16,),
    dtype: torch.dtype = torch.bfloat16,
    architecture: int = 90,
) -> int:
    return lora_few_floats(m, k, ranks, dtype, architecture)


def test_sums_are_of_eight_shares_and_ranks_rounded_up_to_sixteen() -> None:
    assert floats() == 8 * 4 * 16
    assert floats(m=64, ranks=(3, 17, 64)) == 8 * 64 * (16 + 32 + 64)
    assert floats(architecture=80, dtype=torch.float16) > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"m": 0},
        {"m": 65},
        {"k": 0},
        {"k": 96},
        {"ranks": ()},
        {"ranks": (8,) * 5},
        {"ranks": (8, 0)},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"architecture": 75},
    ],
    ids=str,
)
def test_what_is_not_taken(changed: dict[str, object]) -> None:
    assert floats(**changed) == 0  # type: ignore[arg-type]
