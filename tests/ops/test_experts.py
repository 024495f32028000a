"""Rows sorted by expert, spread and collected, on every device, against torch's own indexing in float64."""

from __future__ import annotations

from typing import Any

import blocks
import pytest
import torch
from blocks import DTYPES, dtype_id
from tolerances import assert_exact
from torch import Tensor

from fastpeft.ops.experts import Routing, collect_rows, route, spread_rows

# name: (t, top_k, experts); what each is there for
ROUTES = {
    "mixtral": (77, 2, 8),
    "qwen3-moe": (300, 8, 128),
    "one-token": (1, 8, 128),
    "one-pair": (1, 1, 5),
    "one-expert": (70, 1, 1),
    "every-expert": (33, 5, 5),
    "step-of-32": (4, 8, 31),
    "one-beyond-a-step": (33, 1, 33),
    "parts-of-many-steps": (5000, 8, 128),
    "last-of-8-bits": (40, 6, 255),
    "first-of-9-bits": (40, 6, 256),
    "fewer-parts": (400, 4, 700),
    "most-experts": (300, 3, 1024),
    "more-experts": (300, 3, 1025),
}

# name: (t, top_k, experts, h)
ROWS = {
    "t17-k8-e128-h256": (17, 8, 128, 256),
    "t9-k2-e8-h2048": (9, 2, 8, 2048),
    "t9-k1-e1-h64": (9, 1, 1, 64),
    "t5-k3-e5-h37": (5, 3, 5, 37),
    "t6-k5-e5-h2056": (6, 5, 5, 2056),
    "t4-k10-e128-h72": (4, 10, 128, 72),
    "t7-k4-e16-h1": (7, 4, 16, 1),
    "t1-k8-e128-h4096": (1, 8, 128, 4096),
    "t3-k20-e33-h19": (3, 20, 33, 19),
}


def draw_ids(t: int, top_k: int, experts: int, device: str) -> Tensor:
    """Distinct in a row, in any order."""
    return torch.rand(t, experts, device=device).topk(top_k).indices


def assert_sorted(ids: Tensor, experts: int, routing: Routing) -> None:
    """What `route` promises, from the definition: a stable sort, with all that is no expert's at its end."""
    ids = ids.cpu()
    is_an_expert = (ids >= 0) & (ids < experts)
    order = torch.where(is_an_expert, ids, experts).flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel())
    assert_exact(routing.place.cpu(), place.view(ids.shape).int())
    counts = torch.bincount(ids[is_an_expert], minlength=experts)
    assert_exact(routing.ends.cpu(), counts.cumsum(0).int())


# --- route ---
@pytest.mark.parametrize("sizes", ROUTES.values(), ids=ROUTES)
def test_route_sorts_by_expert(sizes: tuple[int, int, int], device: str) -> None:
    t, top_k, experts = sizes
    ids = draw_ids(t, top_k, experts, device)
    assert_sorted(ids, experts, route(ids, experts))


@pytest.mark.parametrize("experts", [2, 128, 1024])
@pytest.mark.parametrize("which", ["first", "last", "two"])
def test_experts_without_rows(which: str, experts: int, device: str) -> None:
    """All tokens go to one expert, or in turns to two: the others' rows end where they begin."""
    t = 2000
    ids = torch.zeros(t, 1, dtype=torch.int64, device=device)
    if which == "last":
        ids += experts - 1
    elif which == "two":
        ids[1::2] += experts - 1
    routing = route(ids, experts)
    assert_sorted(ids, experts, routing)
    of_first = {"first": t, "last": 0, "two": t // 2}[which]
    assert routing.ends.tolist() == [of_first] * (experts - 1) + [t]


@pytest.mark.parametrize("experts", [5, 128, 1025])
def test_ids_that_are_no_expert(experts: int, device: str) -> None:
    """They stand behind all experts, each in a row of its own, so that spreading and collecting stay in bounds."""
    ids = draw_ids(200, 4, experts, device)
    wrong = torch.tensor([-1, experts, 1 << 40, -(1 << 40), (1 << 32) + 1], device=device)
    ids[::3, 1] = wrong[torch.arange(len(ids[::3]), device=device) % len(wrong)]
    place, ends = routing = route(ids, experts)
    assert_sorted(ids, experts, routing)
    assert place.flatten().sort().values.tolist() == list(range(800))
    assert ends[-1] == 800 - 67 and bool((place[::3, 1] >= ends[-1]).all())
    x = torch.randn(200, 16, device=device)
    torch.testing.assert_close(collect_rows(spread_rows(x, place), place), 4 * x)


def test_all_ids_are_wrong(device: str) -> None:
    place, ends = route(torch.full((70, 2), 9, device=device), 9)
    assert ends.tolist() == [0] * 9
    assert place.flatten().tolist() == list(range(140))


def test_ids_that_are_not_contiguous(device: str) -> None:
    ids = draw_ids(60, 4, 16, device)
    transposed = ids.t().contiguous().t()
    assert_sorted(transposed, 16, route(transposed, 16))


# --- rows ---
def plain_spread(x: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """By a gather of each row's token; products in float32 at least, as ours."""
    rows = x.unsqueeze(1).expand(-1, place.shape[1], -1)
    if weights is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = (rows.to(wide) * weights.to(wide).unsqueeze(2)).to(x.dtype)
    return rows.flatten(0, 1)[place.flatten().argsort()]


def plain_collect(y: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    rows = y[place.long()].to(wide)
    if weights is not None:
        rows = rows * weights.to(wide).unsqueeze(2)
    return rows.sum(1).to(y.dtype)


def draw(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, weights_dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of tokens, rows of experts, places, and weights that are all different and not small."""
    t, top_k, experts, h = sizes
    place = route(draw_ids(t, top_k, experts, device), experts).place
    x, y = (torch.randn(rows, h, device=device).to(dtype) for rows in (t, t * top_k))
    return x, y, place, (torch.rand(t, top_k, device=device) + 0.5).to(weights_dtype)


@pytest.mark.parametrize("weighting", ["unweighted", "fp32-weights", "weights-alike"])
@pytest.mark.parametrize("sizes", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_and_gradients(dtype: torch.dtype, sizes: tuple[int, int, int, int], weighting: str, device: str) -> None:
    """`compare` also wants equal bits from equal calls."""
    x, y, place, weights = draw(sizes, dtype, dtype if weighting == "weights-alike" else torch.float32, device)
    for ours, plain, rows in ((spread_rows, plain_spread, x), (collect_rows, plain_collect, y)):
        leaves = [rows.requires_grad_()] + ([] if weighting == "unweighted" else [weights.requires_grad_()])

        def run(function: Any, rows: Tensor, weights: Tensor | None = None) -> Tensor:
            out: Tensor = function(rows, place, weights)
            return out

        blocks.compare(
            lambda *given, ours=ours: run(ours, *given), lambda *given, plain=plain: run(plain, *given), leaves
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_unweighted_rows_are_copies(dtype: torch.dtype, device: str) -> None:
    x, _, place, _ = draw((50, 6, 20, 96), dtype, dtype, device)
    assert_exact(spread_rows(x, place), plain_spread(x, place, None))


def test_by_hand(device: str) -> None:
    """Token 0 goes to experts 2 and 0, token 1 to 2 and 1: rows are (0 for 0), (1 for 1), (0 for 2), (1 for 2)."""
    place, ends = route(torch.tensor([[2, 0], [2, 1]], device=device), 3)
    assert place.tolist() == [[2, 0], [3, 1]] and ends.tolist() == [1, 2, 4]
    x = torch.tensor([[1.0], [10.0]], device=device)
    weights = torch.tensor([[0.5, 2.0], [0.25, 4.0]], device=device)
    assert spread_rows(x, place).flatten().tolist() == [1, 10, 1, 10]
    assert spread_rows(x, place, weights).flatten().tolist() == [2, 40, 0.5, 2.5]
    y = torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=device)
    assert collect_rows(y, place).flatten().tolist() == [4, 6]
    assert collect_rows(y, place, weights).flatten().tolist() == [3.5, 9]


@pytest.mark.parametrize("layout", ["off-the-grid", "strided-rows", "strided-elements"])
def test_any_layout(layout: str, device: str) -> None:
    """Rows that start between 16-byte borders, rows that are apart, elements that are apart; places and weights too."""
    x, y, place, weights = draw((20, 4, 9, 64), torch.bfloat16, torch.float32, device)
    wanted = spread_rows(x, place, weights), collect_rows(y, place, weights)

    def laid(rows: Tensor) -> Tensor:
        if layout == "off-the-grid":
            return torch.cat((rows.new_zeros(1), rows.flatten()))[1:].view(rows.shape)
        if layout == "strided-rows":
            return torch.cat((rows, rows), 1)[:, : rows.shape[1]]
        return rows.t().contiguous().t()

    x, y, place, weights = (laid(given) for given in (x, y, place, weights))
    assert_exact(spread_rows(x, place, weights), wanted[0])
    assert_exact(collect_rows(y, place, weights), wanted[1])


def test_gradients_that_are_expanded(device: str) -> None:
    """A sum's gradient has stride 0."""
    x, y, place, weights = draw((20, 4, 9, 64), torch.float32, torch.float32, device)
    for function, rows in ((spread_rows, x), (collect_rows, y)):
        leaves = [rows.requires_grad_(), weights.requires_grad_()]
        out = function(rows, place, weights)
        expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        for value, reference in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
            assert_exact(value, reference)


def test_only_what_needs_a_gradient(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is more computed, nor rows kept that only the gradient of weights would read."""
    x, y, place, weights = draw((20, 4, 9, 64), torch.float32, torch.bfloat16, device)
    for function, rows in ((spread_rows, x), (collect_rows, y)):
        out = function(rows.requires_grad_(), place, weights)
        assert all(saved is None or saved.shape == place.shape for saved in out.grad_fn.saved_tensors)
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.fastpeft, "experts_dots", None)
            out.sum().backward()
        rows.requires_grad_(False)
        out = function(rows, place, weights.requires_grad_())
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.fastpeft, "experts_spread", None)
            patch.setattr(torch.ops.fastpeft, "experts_collect", None)
            out.sum().backward()
        assert weights.grad is not None and weights.grad.dtype == torch.bfloat16
        weights.grad = None
        weights.requires_grad_(False)


def test_no_tokens(device: str) -> None:
    place, ends = route(torch.zeros(0, 8, dtype=torch.int64, device=device), 128)
    assert place.shape == (0, 8) and ends.tolist() == [0] * 128
    x, weights = torch.zeros(0, 64, device=device), torch.zeros(0, 8, device=device)
    for function in (spread_rows, collect_rows):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = function(leaves[0], place, leaves[1])
        assert out.shape == (0, 64)
        assert [grad.shape for grad in torch.autograd.grad(out.sum(), leaves)] == [(0, 64), (0, 8)]


def test_float16_is_summed_in_float32(device: str) -> None:
    """Eight rows whose sum leaves float16 on the way and comes back."""
    place = route(torch.arange(8, device=device).view(1, 8), 8).place
    y = torch.tensor([[60000.0], [60000.0], [60000.0], [-60000.0]] * 2, device=device).half()
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -0.5]], device=device)
    assert collect_rows(y, place, weights).tolist() == [[-30000.0]]


def test_gradcheck() -> None:
    place = route(draw_ids(5, 3, 7, "cpu"), 7).place
    weights = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x, y = (torch.randn(rows, 6, dtype=torch.float64, requires_grad=True) for rows in (5, 15))
    assert torch.autograd.gradcheck(lambda x, weights: spread_rows(x, place, weights), (x, weights))
    assert torch.autograd.gradcheck(lambda y, weights: collect_rows(y, place, weights), (y, weights))


def test_registration_and_compile(device: str) -> None:
    x, y, place, weights = draw((20, 4, 9, 64), torch.float32, torch.float32, device)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    library = torch.ops.fastpeft
    ids = draw_ids(20, 4, 9, device)
    for op, arguments in (
        (library.experts_route, (ids, 9)),
        (library.experts_spread, (x, place, weights)),
        (library.experts_collect, (y, place, None)),
        (library.experts_dots, (x, y, place)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=utils)

    def mixture(x: Tensor, weights: Tensor) -> Tensor:
        place = route(ids, 9).place
        return collect_rows(spread_rows(x, place).square(), place, weights)

    leaves = [x.requires_grad_(), weights.requires_grad_()]
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True)

    def results(function: Any) -> list[Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for value, reference in zip(results(compiled), results(mixture), strict=True):
        assert_exact(value, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [128, 1025], ids=["one-launch", "by-torch"])
def test_replays_of_a_graph_follow_the_ids(experts: int) -> None:
    """A captured call is replayed with ids of other loads; nothing that it works in must have been zeroed before."""
    ids = draw_ids(64, 8, experts, "cuda")
    x, weights = torch.randn(64, 256, device="cuda"), torch.rand(64, 8, device="cuda")

    def step() -> tuple[Tensor, ...]:
        place, ends = route(ids, experts)
        return place, ends, collect_rows(spread_rows(x, place), place, weights)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for changed in (draw_ids(64, 8, experts, "cuda"), draw_ids(64, 8, 9, "cuda"), torch.full_like(ids, -1)):
        ids.copy_(changed)
        graph.replay()
        assert_sorted(ids, experts, Routing(*captured[:2]))
        for value, reference in zip(captured, step(), strict=True):
            assert_exact(value, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_kernels_agree_with_the_cpu(dtype: torch.dtype) -> None:
    """Places to the bit; rows within one rounding, as torch's products and sums are not fused."""
    x, y, _, weights = draw((500, 8, 128, 200), dtype, torch.float32, "cpu")
    ids = draw_ids(500, 8, 128, "cpu")
    place, ends = route(ids, 128)
    for value, reference in zip(route(ids.cuda(), 128), (place, ends), strict=True):
        assert_exact(value, reference)
    assert_exact(spread_rows(x.cuda(), place.cuda(), weights.cuda()), spread_rows(x, place, weights))
    torch.testing.assert_close(
        collect_rows(y.cuda(), place.cuda(), weights.cuda()).cpu(), collect_rows(y, place, weights)
    )


@pytest.mark.gpu
def test_places_that_are_not_there() -> None:
    """The kernels leave them out: memory before and behind the rows is neither read nor written."""
    x = torch.ones(2, 64, device="cuda")
    place = torch.tensor([[1, -1], [4, 2]], dtype=torch.int32, device="cuda")
    assert collect_rows(torch.full((4, 64), 3.0, device="cuda"), place)[:, 0].tolist() == [3.0, 3.0]
    assert torch.ops.fastpeft.experts_dots(x, torch.ones(4, 64, device="cuda"), place).tolist() == [[64, 0], [0, 64]]
    assert spread_rows(x, place)[[1, 2], 0].tolist() == [1.0, 1.0]
    torch.cuda.synchronize()


# --- errors ---
@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int32), 4, r"ids is torch.int32 of shape \(3, 2\); it must be torch.int64"),
        (torch.zeros(3, dtype=torch.int64), 4, r"ids is torch.int64 of shape \(3,\)"),
        (torch.zeros(3, 0, dtype=torch.int64), 4, "at least one expert a token"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, "experts is 0; it must be at least 1"),
        (torch.zeros(1, 1, dtype=torch.int64).expand(1 << 30, 2), 4, "1073741824 x 2 ids are too many"),
    ],
    ids=["dtype", "dims", "no-choice", "no-experts", "too-many"],
)
def test_ids_that_are_refused(ids: Tensor, experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"route: .*{message}"):
        route(ids, experts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(4, 8)}, r"has shape \(4, 8\); for this place it must be \({rows}, h\)"),
        ({"rows": torch.zeros(8)}, r"has shape \(8,\)"),
        ({"rows": "empty"}, r"must be \({rows}, h\)"),
        ({"rows": "integers"}, "dtype torch.int64 is not supported"),
        ({"place": torch.zeros(3, 2, dtype=torch.int64)}, r"place is torch.int64 .* must be torch.int32, \(t, top_k\)"),
        ({"place": torch.zeros(6, dtype=torch.int32)}, r"place is torch.int32 of shape \(6,\)"),
        ({"weights": torch.zeros(3, 3)}, r"weights are torch.float32 of shape \(3, 3\); they must be floating, \(3, 2"),
        ({"weights": torch.zeros(3, 2, dtype=torch.int32)}, "weights are torch.int32"),
        ({"weights": torch.zeros(3, 2, device="meta")}, "on cpu; place and weights must be there too"),
    ],
    ids=["rows", "rows-dims", "no-columns", "dtype", "place-dtype", "place-dims", "weights", "integers", "device"],
)
@pytest.mark.parametrize("function", [spread_rows, collect_rows], ids=["spread", "collect"])
def test_what_does_not_fit_is_refused(function: Any, changes: dict[str, Any], message: str) -> None:
    rows = 3 if function is spread_rows else 6
    given: dict[str, Any] = {
        "rows": torch.zeros(rows, 8),
        "place": torch.zeros(3, 2, dtype=torch.int32),
        "weights": torch.zeros(3, 2),
        **changes,
    }
    if isinstance(given["rows"], str):
        given["rows"] = torch.zeros(rows, 0) if given["rows"] == "empty" else torch.zeros(rows, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{function.__name__}: .*{message.replace('{rows}', str(rows))}"):
        function(*given.values())


@pytest.mark.gpu
def test_float64_on_cuda_is_refused() -> None:
    place = route(torch.zeros(3, 1, dtype=torch.int64, device="cuda"), 1).place
    with pytest.raises(ValueError, match="float64 is not supported on CUDA"):
        spread_rows(torch.zeros(3, 8, dtype=torch.float64, device="cuda"), place)
