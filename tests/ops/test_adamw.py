"""AdamW over lists: each step against float64, in both kinds of state; the norm, clipping, skipping, and bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from ops.adamw_reference import HYPER, TIE, decode, excess, step_in
from tolerances import assert_exact, assert_ratio, relative_error
from torch import Tensor

from fastpeft.ops.adamw import BLOCK, AdamWControl, AdamWList, adamw_gradient_norm, dynamic_map

SIZES = [1, 3, 255, 256, 257, 4096, 4099, 0, 70001]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Problem:
    """Parameters of a few sizes with their state, in one list."""

    device: str
    dtype: torch.dtype = torch.float32
    eight_bit: bool = False
    sizes: list[int] = field(default_factory=lambda: list(SIZES))
    shift: int = 0  # elements that all tensors are off the 16-byte grid
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.params = [self.randn(n, self.dtype) for n in self.sizes]
        self.steps = [torch.zeros((), device=self.device) for _ in self.sizes]
        state = torch.uint8 if self.eight_bit else torch.float32
        self.ms, self.vs = ([torch.zeros(n, dtype=state, device=self.device) for n in self.sizes] for _ in range(2))
        self.scales, self.scales_sq = (
            [torch.zeros(-(-n // BLOCK), device=self.device) for n in self.sizes] for _ in range(2)
        )
        self.list = self.make_list()
        self.control = AdamWControl(torch.device(self.device))

    def make_list(self) -> AdamWList:
        scales = (self.scales, self.scales_sq) if self.eight_bit else (None, None)
        numbers = list(range(len(self.sizes)))
        return AdamWList(self.params, self.steps, self.ms, self.vs, *scales, numbers=numbers)

    def randn(self, n: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(n + self.shift, generator=self.generator)
        return values.to(self.device, dtype)[self.shift :]

    def grads(self, dtype: torch.dtype | None = None, scale: float = 1.0) -> list[Tensor]:
        return [self.randn(n, dtype or self.dtype, scale) for n in self.sizes]

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        if not self.eight_bit:
            return self.ms[i].clone(), self.vs[i].clone()
        return decode(self.ms[i], self.scales[i], True), decode(self.vs[i], self.scales_sq[i], False)

    def everything(self) -> list[Tensor]:
        state = [*self.params, *self.ms, *self.vs, *self.scales, *self.scales_sq, *self.steps]
        return [tensor.clone() for tensor in state]


def check_step(problem: Problem, grads: list[Tensor], step: int, factor: float = 1.0, maximize: bool = False) -> None:
    """Every tensor after one step against float64, allowed what plain torch in float32 may be off."""
    before = [(p.clone(), *problem.moments(i)) for i, p in enumerate(problem.params)]
    problem.list.step(grads, problem.control, maximize=maximize, **HYPER)
    results = []
    for i, ((p, m, v), g) in enumerate(zip(before, grads, strict=True)):
        exact, plain = (step_in(dtype, p, g, m, v, step, factor, maximize) for dtype in (torch.float64, torch.float32))
        if problem.eight_bit:
            assert excess(problem.ms[i], problem.scales[i], exact[1], True) < TIE
            assert excess(problem.vs[i], problem.scales_sq[i], exact[2], False) < TIE
        results.append(((problem.params[i], problem.ms[i], problem.vs[i]), plain, exact))
        assert float(problem.steps[i]) == step
    for part in range(1 if problem.eight_bit else 3):
        outs, plains, exacts = (torch.cat([tensors[side][part] for tensors in results]) for side in range(3))
        assert_ratio(outs, plains.to(outs.dtype), exacts)


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("shift", [0, 1], ids=["grid", "off-grid"])
@pytest.mark.parametrize("grad", FLOATS)
@pytest.mark.parametrize("param", FLOATS)
def test_steps_against_float64(param: str, grad: str, shift: int, state: str, device: str) -> None:
    problem = Problem(device, FLOATS[param], state == "8bit", shift=shift)
    for step in range(1, 4):
        check_step(problem, problem.grads(FLOATS[grad], scale=step), step)


def test_maximize_and_a_learning_rate_on_the_device(device: str) -> None:
    problem, other = Problem(device), Problem(device)
    for step in range(1, 3):
        grads = problem.grads()
        check_step(problem, grads, step, maximize=True)
        lr = torch.tensor(HYPER["lr"], device=device)
        other.list.step(grads, other.control, maximize=True, **{**HYPER, "lr": lr})
    for p, q in zip(problem.params, other.params, strict=True):
        assert p.numel() == 0 or relative_error(q, p) < 1e-6


def test_the_maps_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert_exact(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


def test_a_small_second_moment_does_not_become_zero(device: str) -> None:
    """With a code of zero, what is left of the first moment over eps alone would throw the parameter away."""
    p, g = torch.zeros(BLOCK, device=device), torch.full((BLOCK,), 1e-4, device=device)
    g[0] = 1.0
    m, v = (torch.zeros(BLOCK, dtype=torch.uint8, device=device) for _ in range(2))
    scales = [torch.zeros(1, device=device) for _ in range(2)]
    rows = AdamWList([p], [torch.zeros((), device=device)], [m], [v], [scales[0]], [scales[1]])
    control = AdamWControl(torch.device(device))
    for _ in range(10):
        rows.step([g], control, **HYPER)
        g = torch.zeros_like(g)  # the first moment lingers
    assert int((v == 0).sum()) == 0
    assert float(p.abs().max()) < 1.0


def test_zero_gradients_leave_zero_state(device: str) -> None:
    problem = Problem(device, eight_bit=True)
    before = problem.everything()
    grads = [torch.zeros_like(p) for p in problem.params]
    problem.list.step(grads, problem.control, **{**HYPER, "weight_decay": 0.0})
    for i, p in enumerate(problem.params):
        assert_exact(p, before[i])
        assert not problem.moments(i)[0].any() and not problem.moments(i)[1].any()


def test_nan_gradients_without_a_norm_stay_in_their_block(device: str) -> None:
    problem = Problem(device, eight_bit=True, sizes=[3 * BLOCK])
    (grad,) = problem.grads()
    grad[BLOCK + 7] = math.nan
    problem.list.step([grad], problem.control, **HYPER)
    assert problem.scales[0].isnan().tolist() == [False, True, False]
    assert int(problem.params[0].isnan().sum()) == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_norm_clipping_and_scale(dtype: str, device: str) -> None:
    problem = Problem(device, FLOATS[dtype])
    problem.sizes = [200_003, *SIZES]
    for max_norm, scale in [(None, None), (1.0, None), (1e6, 8.0), (0.5, 8.0)]:
        grads = problem.grads(scale=scale or 1.0)
        grad_scale = None if scale is None else torch.tensor(scale, device=device)
        adamw_gradient_norm([grads], problem.control, max_norm=max_norm, grad_scale=grad_scale)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads)) / (scale or 1.0)
        factor = min(1.0, (max_norm or math.inf) / (norm + 1e-6)) / (scale or 1.0)
        assert float(problem.control.grad_norm) == pytest.approx(norm, rel=1e-5)
        assert float(problem.control.grad_factor) == pytest.approx(factor, rel=1e-5)
        assert int(problem.control.skip) == 0 == int(problem.control.skipped)


def test_the_norm_over_several_dtypes_and_more_tensors_than_a_launch_takes(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    lists = [
        [torch.randn(i % 7, generator=generator).to(device, dtype) for i in range(count)]
        for dtype, count in [(torch.float32, 3500), (torch.bfloat16, 10), (torch.float16, 0)]
    ]
    control = AdamWControl(torch.device(device))
    norms = []
    for _ in range(2):
        adamw_gradient_norm(lists, control)
        norms.append(control.grad_norm.clone())
    expected = math.sqrt(sum(float(g.double().square().sum()) for grads in lists for g in grads))
    assert float(norms[0]) == pytest.approx(expected, rel=1e-5)
    assert_exact(norms[1], norms[0])


def test_clipped_steps_against_float64(device: str) -> None:
    problem = Problem(device)
    for step in range(1, 3):
        grads = problem.grads(scale=3.0)
        adamw_gradient_norm([grads], problem.control, max_norm=1.0)
        check_step(problem, grads, step, factor=float(problem.control.grad_factor))


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "found"])
def test_a_skipped_step_writes_nothing(bad: float | str, state: str, device: str) -> None:
    problem = Problem(device, eight_bit=state == "8bit")
    check_step(problem, problem.grads(), 1)
    before, grads, found = problem.everything(), problem.grads(), None
    if isinstance(bad, str):
        found = torch.ones((), device=device)
    else:
        grads[-1][-1] = bad
    for times in (1, 2):
        adamw_gradient_norm([grads], problem.control, max_norm=1.0, found_inf=found)
        problem.list.step(grads, problem.control, **HYPER)
        assert int(problem.control.skip) == 1 and int(problem.control.skipped) == times
    for now, then in zip(problem.everything(), before, strict=True):
        assert_exact(now, then)
    grads = problem.grads()
    adamw_gradient_norm([grads], problem.control, found_inf=torch.zeros((), device=device))
    check_step(problem, grads, 2)
    problem.control.skip.fill_(1)
    problem.control.grad_factor.fill_(0.5)
    problem.control.reset()
    check_step(problem, problem.grads(), 3)


def test_found_inf_alone_needs_no_gradients(device: str) -> None:
    control = AdamWControl(torch.device(device))
    scale = torch.tensor(4.0, device=device)
    adamw_gradient_norm([], control, grad_scale=scale, found_inf=torch.ones((), device=device))
    assert (int(control.skip), int(control.skipped), float(control.grad_norm)) == (1, 1, 0.0)
    adamw_gradient_norm([], control, grad_scale=scale, found_inf=torch.zeros((), device=device))
    assert (int(control.skip), int(control.skipped), float(control.grad_factor)) == (0, 1, 0.25)


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("param", ["fp32", "bf16"])
def test_pieces_have_the_bits_of_the_whole(param: str, state: str, device: str) -> None:
    """However a parameter is cut, in one list or over two, and with stochastic rounding too."""
    dtype, eight_bit = FLOATS[param], state == "8bit"
    whole, cut = (Problem(device, dtype, eight_bit, sizes=[5000]) for _ in range(2))

    def piece(first: int, behind: int) -> list[Tensor]:
        scales = slice(first // BLOCK, -(-behind // BLOCK))
        state = [cut.ms[0][first:behind], cut.vs[0][first:behind]]
        return state + ([cut.scales[0][scales], cut.scales_sq[0][scales]] if eight_bit else [])

    def rows(*cuts: tuple[int, int], advance: bool) -> AdamWList:
        count = len(cuts)
        state = zip(*(piece(*ends) for ends in cuts), strict=True)
        offsets = [first for first, _ in cuts]
        params, steps = [cut.params[0]] * count, [cut.steps[0]] * count
        return AdamWList(params, steps, *state, offsets=offsets, advance=[advance] * count)

    first, second = rows((0, 512), (512, 1280), advance=True), rows((1280, 5000), advance=False)
    for step in range(3):
        (grad,) = whole.grads()
        options = {**HYPER, "stochastic_rounding": param == "bf16", "seed": 5}
        whole.list.step([grad], whole.control, **options)
        first.step([grad, grad], cut.control, **options)
        second.step([grad], cut.control, **options)
        assert float(cut.steps[0]) == step + 1
    for one, other in zip(cut.everything(), whole.everything(), strict=True):
        assert_exact(one, other)


def test_stochastic_rounding_is_unbiased_and_seeded(device: str) -> None:
    n = 1 << 16
    start = torch.ones(n, dtype=torch.bfloat16, device=device)
    grad = torch.ones(n, device=device)
    options = {**HYPER, "lr": 1e-4, "weight_decay": 0.0}
    results = []
    for seed, number in [(1, 0), (1, 0), (2, 0), (1, 1)]:
        p, m, v = start.clone(), torch.zeros(n, device=device), torch.zeros(n, device=device)
        rows = AdamWList([p], [torch.zeros((), device=device)], [m], [v], numbers=[number])
        control = AdamWControl(torch.device(device))
        for _ in range(10):
            rows.step([grad], control, stochastic_rounding=True, seed=seed, **options)
        results.append(p)
    assert_exact(results[1], results[0])
    for other in results[2:]:
        assert bool((other != results[0]).any())
    # Ten steps of 1e-4 are a quarter of the distance to the next bfloat16 below: rounding to nearest would stay at 1.
    moved = (1.0 - results[0].double()).mean()
    sigma = math.sqrt(10 * 1e-4 * 2**-8 / n)
    assert abs(float(moved) - 1e-3) < 7 * sigma


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_narrower_cpu_units_give_the_same_bits(level: str) -> None:
    script = (
        "import torch; from ops.test_adamw import FLOATS, HYPER, Problem; from fastpeft.ops import adamw;"
        "problems = [Problem('cpu', dtype, eight) for dtype in FLOATS.values() for eight in (False, True)]\n"
        "for p in problems:\n"
        "    for step in range(2):\n"
        "        grads = p.grads()\n"
        "        adamw.adamw_gradient_norm([grads], p.control, max_norm=1.0)\n"
        "        p.list.step(grads, p.control, stochastic_rounding=p.dtype == torch.bfloat16, **HYPER)\n"
        "print([t.double().flatten().cumsum(0).sum().item() for p in problems for t in p.everything()])"
    )

    def run(value: str) -> str:
        environment = {**os.environ, "FASTPEFT_CPU": value, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout

    assert run(level) == run("")


# --- bad input -------------------------------------------------------------------------------------------------------


def test_errors(device: str) -> None:
    p, step, m, v = (torch.zeros(8, device=device) for _ in range(4))
    step = step[0]
    with pytest.raises(ValueError, match="got 1 params but 2 steps"):
        AdamWList([p], [step, step], [m], [v])
    with pytest.raises(ValueError, match=r"shape \(4, 2\), or a moment of it, is not contiguous"):
        AdamWList([p.view(2, 4).T], [step], [m], [v])
    with pytest.raises(ValueError, match=r"moments that are torch.float64 and torch.float32"):
        AdamWList([p], [step], [m.double()], [v])
    with pytest.raises(ValueError, match=r"step count that is torch.float64"):
        AdamWList([p], [step.double()], [m], [v])
    with pytest.raises(ValueError, match=r"moments of shapes \(8,\) and \(7,\)"):
        AdamWList([p], [step], [m], [v[:7]])
    with pytest.raises(ValueError, match=r"moments of shapes \(8,\) and \(8,\) from its element 1 on"):
        AdamWList([p], [step], [m], [v], offsets=[1])
    with pytest.raises(ValueError, match="uint8 moments need absmaxes"):
        AdamWList([p], [step], [m.byte()], [v.byte()])
    with pytest.raises(ValueError, match=r"scales of shape \(2,\), torch.float32; 8 elements need 1"):
        AdamWList([p], [step], [m.byte()], [v.byte()], [m[:2]], [m[:1]])
    with pytest.raises(ValueError, match="float64 is not supported"):
        double = p.double()
        AdamWList([double], [step], [m], [v]).step([double], AdamWControl(p.device), **HYPER)
    rows, control = AdamWList([p], [step], [m], [v]), AdamWControl(p.device)
    for grads, message in [
        ([], "got 0 gradients for 1 tensors"),
        ([p[:4]], r"has a gradient of shape \(4,\)"),
        ([torch.zeros(16, device=device)[::2]], "with strides"),
        ([p.to_sparse()], "sparse"),
    ]:
        with pytest.raises(ValueError, match=message):
            rows.step(grads, control, **HYPER)
    with pytest.raises(ValueError, match="stochastic rounding is for bfloat16"):
        rows.step([p], control, stochastic_rounding=True, **HYPER)
    with pytest.raises(ValueError, match="a list must be contiguous and of one dtype"):
        adamw_gradient_norm([[p, p.half()]], control)
    assert not step.any()
    AdamWList([], [], [], []).step([], control, **HYPER)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_a_captured_step_goes_on_as_eager_ones_do(state: str) -> None:
    """Replays count steps, and eager steps with other gradients between them do not disturb the graph's addresses."""
    graphed, eager = (Problem("cuda", eight_bit=state == "8bit") for _ in range(2))
    static = graphed.grads()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        adamw_gradient_norm([static], graphed.control, max_norm=1.0)
        graphed.list.step(static, graphed.control, **HYPER)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            adamw_gradient_norm([static], graphed.control, max_norm=1.0)
            graphed.list.step(static, graphed.control, **HYPER)
    torch.cuda.synchronize()
    other = [torch.full_like(g, 0.5) for g in static]
    graph.replay()
    adamw_gradient_norm([other], graphed.control, max_norm=1.0)
    graphed.list.step(other, graphed.control, **HYPER)
    graph.replay()
    for grads in (static, static, other, static):
        adamw_gradient_norm([grads], eager.control, max_norm=1.0)
        eager.list.step(grads, eager.control, **HYPER)
    for one, two in zip(graphed.everything(), eager.everything(), strict=True):
        assert_exact(one, two)


@pytest.mark.gpu
def test_runs_behind_the_callers_stream() -> None:
    """The gradient is written by a slow stream; a step on another one would take what was there before."""
    n = 1 << 24
    p, m, v, grad = (torch.zeros(n, device="cuda") for _ in range(4))
    rows = AdamWList([p], [torch.zeros((), device="cuda")], [m], [v])
    control = AdamWControl(p.device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        grad.fill_(1.0)
        rows.step([grad], control, **{**HYPER, "weight_decay": 0.0})
    stream.synchronize()
    assert float(p.max()) == pytest.approx(-HYPER["lr"], rel=1e-5)
