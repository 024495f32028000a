"""Words that kernels count in: one place a stream, and one a stream of a capture."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from fastpeft import ops
from fastpeft.ops import native


class Captures:
    """Stands in for CUDA: which stream is captured into what."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream, self.capture = 1, 7
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False)
        patch.setattr(native, "stream_context", lambda device: None)
        patch.setattr(native._C, "capture_id", lambda context: self.capture)
        patch.setattr(native, "_counter_pools", {None: [torch.zeros(8192, dtype=torch.int32)]})
        patch.setattr(native, "_captured_counters", type(native._captured_counters)())

    def words(self, count: int) -> torch.Tensor:
        return native.counters(count, torch.device("cpu"))


def test_a_capture_has_one_place_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = Captures(monkeypatch)
    first = captures.words(100)
    assert captures.words(2000) is first and first.numel() >= 2000
    more = captures.words(3000)
    assert more.numel() >= 3000 and captures.words(100) is more
    places = [first, more]
    captures.stream = 2
    places.append(captures.words(100))
    captures.capture = 8
    places.append(captures.words(100))
    begins = sorted((place.data_ptr(), place.data_ptr() + 4 * place.numel()) for place in places)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(begins)), "places overlap"


def test_when_the_pool_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = Captures(monkeypatch)
    for captures.capture in range(20):
        assert captures.words(100).numel() >= 100
    assert len(native._captured_counters) == native._MOST_CAPTURES


@pytest.mark.gpu
@torch.no_grad()
def test_captures_of_the_device() -> None:
    w = ops.nf4_quantize(torch.randn(4096, 4096, device="cuda"))
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    expected = ops.nf4_linear(x, w)
    seen: list[Any] = []
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [ops.nf4_linear(x, w) for _ in range(4)]
            seen.append(native.counters(1, x.device))
        for _ in range(3):
            graph.replay()
            assert all(torch.equal(out, expected) for out in outs)
        assert not seen[-1].any()
    assert len({place.data_ptr() for place in seen}) == 3
