"""What a row keeps when something is wrong, absent or slow."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from bench.case import Calls, PeerMissing
from bench.runner import run_case
from bench.timing import Pass, Timer

CPU = torch.device("cpu")


def raises(error: Exception):
    def build(x: torch.Tensor) -> Calls:
        raise error

    return build


def test_ours_and_a_peer_are_checked_timed_and_compared(doubling_case) -> None:
    row = run_case(doubling_case(lambda x: x * 2, {"add": lambda x: Calls([lambda: x + x])}), Timer(CPU), 1, reps=3)
    assert row.ours.status == "ok"
    assert row.ours.error == 0.0
    assert len(row.ours.times.samples_us) == 3
    (peer,) = row.peers
    assert peer.ratio == pytest.approx(peer.times.median / row.ours.times.median)
    assert row.ours.ratio is None


def test_a_row_keeps_no_tensors(doubling_case) -> None:
    """Rows stay until the last table of a run; their checks once held every weight, and 79 GB were not enough."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(x))
        return x * 2

    row = run_case(doubling_case(double, {}), Timer(CPU), 1, reps=2)
    gc.collect()
    assert row.ours.status == "ok"
    assert seen and all(reference() is None for reference in seen)


@pytest.mark.parametrize(
    ("ours", "error"),
    [
        (lambda x: x * 2.1, "relative error 0.05"),
        (lambda x: x * float("nan"), "relative error nan"),
        (lambda x: x[:32] * 2, "relative error inf"),
        (lambda x: [x * 2, x], "relative error inf"),
    ],
    ids=["scaled", "nan", "shape", "count"],
)
def test_a_wrong_result_is_not_timed(doubling_case, ours, error: str) -> None:
    row = run_case(doubling_case(ours, {"add": lambda x: Calls([lambda: x + x])}), Timer(CPU), 1, reps=3)
    assert row.ours.status == "wrong"
    assert error in row.ours.detail
    assert row.ours.times is None


def test_ours_raising_is_a_failed_row(doubling_case) -> None:
    def ours(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    row = run_case(doubling_case(ours), Timer(CPU), 1, reps=3)
    assert (row.ours.status, row.ours.detail) == ("failed", "RuntimeError: no kernel for this")


def test_peers_that_cannot_take_part_stay_with_their_reason(doubling_case) -> None:
    peers = {
        "absent": raises(PeerMissing("not installed")),
        "failing": raises(OSError("no library")),
        "wrong": lambda x: Calls([lambda: x * 3]),
        "raises when called": lambda x: Calls([lambda: 1 / 0]),
        "fine": lambda x: Calls([lambda: x + x], note="a note"),
    }
    row = run_case(doubling_case(lambda x: x * 2, peers), Timer(CPU), 1, reps=2)
    assert row.ours.status == "ok"
    assert [peer.status for peer in row.peers] == ["not installed", "failed", "wrong", "failed", "ok"]
    assert row.peers[1].detail == "OSError: no library"
    assert "relative error 0.5" in row.peers[2].detail
    assert row.peers[4].note == "a note"
    assert [peer.ratio is None for peer in row.peers] == [True, True, True, True, False]


def test_a_peer_with_its_own_check_is_judged_by_it(doubling_case) -> None:
    from bench.reference import close_to

    def half_the_work(x: torch.Tensor) -> Calls:
        return Calls([lambda: x + 0], check=close_to(lambda: [x], 1e-6))

    row = run_case(doubling_case(lambda x: x * 2, {"half": half_the_work}), Timer(CPU), 1, reps=2)
    assert row.peers[0].status == "ok"


class ModeTimer(Timer):
    """Pretends that contenders have the modes given, and that eager ones take ten times as long."""

    def __init__(self, eager_names: set[str]) -> None:
        super().__init__(CPU)
        self.eager_names = eager_names
        self.given: list[str] = []

    def prepare(self, contender: Calls, eager_because: str = "") -> Pass:
        self.given.append(eager_because)
        eager = bool(eager_because) or contender.note in self.eager_names
        return Pass(lambda: None, 1, "eager" if eager else "graph", eager_because)

    def interleave(self, passes, reps):
        from bench.timing import Times

        return {name: Times((100.0 if timed.mode == "eager" else 10.0,) * reps) for name, timed in passes.items()}


def test_an_eager_peer_is_compared_with_ours_eager(doubling_case) -> None:
    peers = {
        "graph": lambda x: Calls([lambda: x + x]),
        "eager": lambda x: Calls([lambda: x + x], note="eager"),
    }
    row = run_case(doubling_case(lambda x: x * 2, peers), ModeTimer({"eager"}), 1, reps=2)
    assert row.ours.mode == "graph"
    assert row.eager.median == 100.0
    assert [peer.ratio for peer in row.peers] == [1.0, 1.0]


def test_when_ours_cannot_be_captured_the_peers_are_not_either(doubling_case) -> None:
    timer = ModeTimer({""})
    row = run_case(doubling_case(lambda x: x * 2, {"peer": lambda x: Calls([lambda: x + x])}), timer, 1, reps=2)
    assert timer.given == ["", "fastpeft could not be captured"]
    assert row.ours.mode == row.peers[0].mode == "eager"
    assert row.peers[0].ratio == 1.0
