"""The registry, the names of cases, and inputs."""

from __future__ import annotations

import math

import pytest
import torch

from bench import case as case_module
from bench.case import Calls, Case, Check, Inputs, PeerMissing, require
from bench.suites import SUITES


def a_case(**sizes: int) -> Case:
    return Case("nf4_gemm", sizes, torch.bfloat16, prepare=lambda inputs: None)


def test_label_and_id_read_as_documented() -> None:
    case = a_case(m=16, n=4096, k=4160)
    assert case.label == "nf4_gemm m=16 n=4096 k=4160 bf16"
    assert case.id == "nf4_gemm-m16-n4096-k4160-bf16"


def test_registry_has_the_suites_by_their_names() -> None:
    assert list(SUITES) == ["nf4_quant", "nf4_gemm", "experts", "lora", "blocks", "adamw", "paged_adamw", "loss"]
    assert all(name == suite.name for name, suite in SUITES.items())


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_ids_are_unique_and_every_suite_has_quick_cases(device_type: str) -> None:
    ids = [case.id for suite in SUITES.values() for case in suite.select(device_type)]
    assert len(ids) == len(set(ids))
    for suite in SUITES.values():
        assert suite.select(device_type, quick=True), suite.name


def test_gpu_cases_cover_what_the_suites_promise() -> None:
    gemm = SUITES["nf4_gemm"].select("cuda")
    for op in ("nf4_gemm", "nf4_gemm_dx"):
        assert {case.sizes["m"] for case in gemm if case.op == op} == {
            *(2**i for i in range(9)),
            *(2**i for i in range(10, 14)),
        }
    lora = SUITES["lora"].select("cuda")
    assert [case.op for case in lora] == ["lora"] * 3 * 2 * 2 * 2 + ["lora_group"] * 2 * 2 * 2
    adamw = SUITES["adamw"].select("cuda")
    assert [case.sizes["tensors"] for case in adamw] == [1, 1, 1, 1, 1, 448, 448]


def test_filter_matches_ids_and_labels() -> None:
    suite = SUITES["nf4_gemm"]
    by_id = suite.select("cuda", text="m16-n4096-k4096")
    by_label = suite.select("cuda", text="m=16 n=4096 k=4096")
    assert [case.id for case in by_id] == [case.id for case in by_label]
    assert len(by_id) == 2


@pytest.mark.parametrize("name", SUITES)
def test_trials_have_the_peers_their_suite_declares(name: str) -> None:
    case = SUITES[name].select("cpu", quick=True)[0]
    trial = case.prepare(case.inputs(torch.device("cpu"), seed=3))
    assert tuple(trial.peers) == SUITES[name].peers
    assert trial.work.bytes > 0


def test_inputs_follow_the_seed_and_are_never_zeros() -> None:
    case = a_case(m=1)
    first, again, other = (case.inputs(torch.device("cpu"), seed).randn(32) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.count_nonzero() == 32


def test_cases_of_one_run_have_different_inputs() -> None:
    x, y = (a_case(m=m).inputs(torch.device("cpu"), seed=1).randn(32) for m in (1, 2))
    assert not torch.equal(x, y)


@pytest.mark.parametrize(("set_bytes", "sets"), [(8_650_000, 24), (60 << 20, 4), (1 << 30, 1)])
def test_input_sets_exceed_l2_fourfold(monkeypatch: pytest.MonkeyPatch, set_bytes: int, sets: int) -> None:
    monkeypatch.setattr(case_module, "l2_bytes", lambda device: 50 << 20)
    inputs = Inputs(torch.device("cpu"), seed=0)
    inputs.device = torch.device("cuda")
    assert inputs.sets(set_bytes) in (sets, sets + 1)
    assert inputs.sets(set_bytes) * set_bytes >= 4 * (50 << 20)


def test_unwritten_elements_show_as_nan() -> None:
    """A contender that leaves half of a reused buffer unwritten used to pass with the values of the run before."""
    buffer = torch.ones(8)

    def writes_half() -> torch.Tensor:
        buffer[:4] = 1.0
        return buffer

    (out,) = Calls([writes_half]).checkable()
    assert out[:4].eq(1).all()
    assert out[4:].isnan().all()


def test_nan_never_passes() -> None:
    check = Check(lambda outputs: math.nan, tolerance=1.0)
    assert not check.passes(math.nan)
    assert not check.passes(math.inf)
    assert check.passes(0.5)


def test_a_package_that_is_not_there_is_a_missing_peer() -> None:
    with pytest.raises(PeerMissing, match="not installed"):
        require("no_such_package_anywhere")
    assert require("math") is math
