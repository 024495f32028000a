"""Runs one case: prepare, check every contender, time them in turns, and keep whatever went wrong in the row."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Literal

import torch

from bench.case import OURS, Bar, Calls, Case, Check, PeerMissing, Trial, Work
from bench.timing import Pass, Timer, Times

_OURS_EAGER = "fastpeft, eager"

Status = Literal["ok", "wrong", "failed", "not installed"]


@dataclass
class Contender:
    """What became of fastpeft or of a peer in one case.

    Attributes:
        name: as the row shows it.
        status: ``wrong`` when the outputs failed the check, ``failed`` when it raised; neither is timed.
        detail: the error behind a status other than ``ok``.
        error: what the check measured; None when it never came to that.
        times: None when it was not timed.
        mode: ``graph``, ``eager`` or ``cpu``.
        eager_because: why it was not captured.
        ratio: its time over fastpeft's in the same mode: above 1, fastpeft is faster.
        peak_bytes: memory a call allocates, on a GPU.
        note: what a reader should know: how fastpeft computed it, or from the peer's adapter.
    """

    name: str
    status: Status = "ok"
    detail: str = ""
    error: float | None = None
    times: Times | None = None
    mode: str = ""
    eager_because: str = ""
    ratio: float | None = None
    peak_bytes: int | None = None
    note: str = ""


@dataclass
class Row:
    """One measurement: a case, fastpeft's result and the peers'.

    Attributes:
        case: what was measured.
        seed: of the run, which with the case's id gives the inputs.
        reps: measured passes of each contender.
        ours: fastpeft's result.
        eager: fastpeft's times without a graph, taken when a peer could only run so.
        peers: in the suite's order.
        work: bytes and operations; None when the case could not be prepared.
        bar: what the outputs were judged by; None when the case could not be prepared.
    """

    case: Case
    seed: int
    reps: int
    ours: Contender
    eager: Times | None = None
    peers: list[Contender] = field(default_factory=list)
    work: Work | None = None
    bar: Bar | None = None


def run_case(case: Case, timer: Timer, seed: int, reps: int) -> Row:
    """Measure a case.

    Args:
        case: what to measure.
        timer: of the device to measure on.
        seed: of the run.
        reps: measured passes of each contender.
    Returns:
        The row; nothing that fastpeft or a peer raises comes out of here.
    """
    row = Row(case, seed, reps, Contender(OURS))
    try:
        with timer.scope():
            _measure(row, timer)
    except Exception as error:  # a failed row is reported and the run goes on
        row.ours.status, row.ours.detail = "failed", describe(error)
    release_memory(timer.device)
    return row


def release_memory(device: torch.device) -> None:
    """Free what a case left behind, so that the next one finds the device as this one did; modules leave cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(row: Row, timer: Timer) -> None:
    trial = row.case.prepare(row.case.inputs(timer.device, row.seed))
    row.work, row.bar, row.ours.note = trial.work, trial.check.bar, trial.ours.note
    row.peers = [Contender(name) for name in trial.peers]

    ours = _judge(row.ours, trial.ours, trial.check)
    if ours is None:
        return
    row.ours.peak_bytes = timer.peak_bytes(ours)
    passes = {OURS: timer.prepare(ours)}
    for peer in row.peers:
        prepared = _prepare_peer(peer, trial, timer, passes[OURS])
        if prepared is not None:
            passes[peer.name] = prepared
    modes = {timed.mode for timed in passes.values()}
    if modes == {"graph", "eager"}:
        passes[_OURS_EAGER] = timer.prepare(ours, eager_because="to compare with a peer that is eager")

    times = timer.interleave(passes, row.reps)
    row.eager = times.get(_OURS_EAGER)
    for contender in (row.ours, *row.peers):
        if contender.name not in passes:
            continue
        timed = passes[contender.name]
        contender.times = times[contender.name]
        contender.mode, contender.eager_because = timed.mode, timed.reason
    for peer in row.peers:
        if peer.times is not None:
            like = row.eager if row.eager is not None and peer.mode == "eager" else times[OURS]
            peer.ratio = peer.times.median / like.median


def _prepare_peer(peer: Contender, trial: Trial, timer: Timer, ours: Pass) -> Pass | None:
    """Build, check and warm up a peer; None when it is absent, raised or computed something else."""
    try:
        calls = trial.peers[peer.name]()
        peer.note = calls.note
        if _judge(peer, calls, trial.check) is None:
            return None
        peer.peak_bytes = timer.peak_bytes(calls)
        like_ours = "fastpeft could not be captured" if ours.mode == "eager" else ""
        return timer.prepare(calls, eager_because=like_ours)
    except PeerMissing as missing:
        peer.status, peer.detail = "not installed", str(missing)
    except Exception as error:  # a peer's failure belongs in the row
        peer.status, peer.detail = "failed", describe(error)
    return None


def _judge(contender: Contender, calls: Calls, check: Check) -> Calls | None:
    """Check a contender's outputs; its calls when they passed."""
    check = calls.check or check
    contender.error = check.error(calls.checkable())
    if check.passes(contender.error):
        return calls
    contender.status = "wrong"
    contender.detail = f"{check.measure} {contender.error:.2g}, at most {check.tolerance:g}"
    return None


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
