"""The tests of the benchmark harness import ``bench`` from the source tree; it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.case import Calls, Case, Inputs, Trial, Work  # noqa: E402
from bench.reference import close_to  # noqa: E402

MakeCase = Callable[..., Case]


@pytest.fixture
def doubling_case() -> MakeCase:
    """Makes a case whose right answer is ``2 * x``, with the contenders a test gives."""

    def make(ours: Callable, peers: dict[str, Callable[[torch.Tensor], Calls]] | None = None) -> Case:
        def prepare(inputs: Inputs) -> Trial:
            x = inputs.randn(64, dtype=torch.float32)
            return Trial(
                ours=Calls([lambda: ours(x)]),
                peers={name: (lambda build=build: build(x)) for name, build in (peers or {}).items()},
                work=Work(bytes=2 * x.nbytes, memory="copy"),
                check=close_to(lambda: [2 * x], 1e-3),
            )

        return Case("double", {"n": 64}, torch.float32, prepare, quick=True)

    return make
