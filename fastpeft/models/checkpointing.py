"""Activation checkpointing that recomputes what is needed, and nothing else.

A decoder layer is one autograd node that keeps its input and what its plan says:

    full        the layer's input, attention's output and log-sum-exp. Recomputed are the norms, the projections and
                the MLP's activation; neither attention nor the down-projection runs again, as nobody reads its output.
    selective   the outputs of the projections too, in as many layers as ``activation_budget_gb`` has room for: what is
                recomputed then is elementwise. Layers with room for everything are not recomputed at all.
    offload     as full, with what is kept in pinned host memory: copied there beside the forward, and fetched back one
                layer ahead of the backward.

Backward recomputes a layer in two halves (`fused`): first from attention's output to the end, then up to attention, so
that the activations of both never stand in memory together. Attention's own node stays alive between forward and
backward; its inputs are taken out of it and put back when they are recomputed. That works with every attention
function, since nothing is assumed of what it saves; one that saves much more than its output is run again instead.
Linear layers of fastpeft and plain ones are replayed from their inputs (`replay`), LoRA dropout from kept seeds. Layers
of other libraries are run again whole, with the random state they had.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastpeft.models import fused
from fastpeft.models.fused import CACHES, STRUCTURE, has_hooks, project
from fastpeft.models.offload import Here, Kept, Shelf
from fastpeft.models.plan import LayerPlan, Planner
from fastpeft.models.replay import Product, Seen, product_of, replay, run, sharing
from fastpeft.models.structure import MLP, Attention, Layer
from fastpeft.nn.adapted import routing_again

_DOWN, _OUT = "down_proj", "o_proj"


@dataclass
class Shared:
    """What the checkpointed layers of one model have in common.

    Attributes:
        planner: says what each layer keeps.
        shelf: host memory for what is offloaded.
        previous: the layer that ran last, whose backward comes after that of the next one.
    """

    planner: Planner
    shelf: Shelf
    previous: weakref.ref[_Work] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        planner = self.planner
        return Shared(Planner(planner.mode, planner.budget_bytes, planner.count), Shelf())


@dataclass
class Checkpointing:
    """How one layer is checkpointed.

    Attributes:
        shared: of the model.
        index: the layer's place.
    """

    shared: Shared
    index: int

    def run(self, layer: nn.Module, structure: Layer, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run the layer in training; a cache is not filled, as it could not be when the layer runs again."""
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHES}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
        assert attention is not None and mlp is not None
        own, gated = attention.__dict__.get(STRUCTURE), mlp.__dict__.get(STRUCTURE)
        if own is None or gated is None or has_hooks(attention) or has_hooks(mlp) or not kwargs.get(_POSITIONS):
            again = routing_again()

            def plain(h: Tensor) -> Tensor:
                with again():
                    return fused.plain_layer(layer, structure, h, **kwargs)

            whole: Tensor = checkpoint(plain, hidden_states, use_reentrant=False)
            return whole
        plan = self.shared.planner.plan(layer, self.index, hidden_states)
        if plan is None:
            return fused.plain_layer(layer, structure, hidden_states, **kwargs)
        work = _Work(layer, (structure, own, gated), kwargs, plan, self.shared)
        out: Tensor = _LayerNode.apply(work, hidden_states, *work.parameters)  # type: ignore[no-untyped-call]
        return out


_POSITIONS = "position_embeddings"


class _LayerNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.work = work
        return work.forward(hidden_states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        work, ctx.work = ctx.work, None
        if work is None:
            raise RuntimeError(
                "backward ran a second time through a checkpointed layer, whose activations are freed by the first; "
                "accelerate(model, checkpointing='none') keeps them"
            )
        return None, *work.backward(d_out, ctx.needs_input_grad[1])


class _Work:
    """One pass through one layer: its forward, what it keeps, its backward."""

    def __init__(
        self,
        layer: Any,
        structures: tuple[Layer, Attention, MLP],
        kwargs: dict[str, Any],
        plan: LayerPlan,
        shared: Shared,
    ) -> None:
        self.layer, self.plan, self.shared = layer, plan, shared
        self.structure, self.own, self.gated = structures
        self.kwargs = {name: value for name, value in kwargs.items() if name != _POSITIONS}
        self.positions = kwargs[_POSITIONS]
        self.attention, self.mlp = layer.self_attn, layer.mlp
        first = [(self.attention, name) for name in self.own.projections]
        second = [(self.attention, _OUT), *((self.mlp, name) for name in (*self.gated.projections, _DOWN))]
        norms = [layer.input_layernorm, *(getattr(self.attention, name) for name in self.own.norms)]
        others = [getattr(layer, name) for name in (self.structure.before_mlp, *self.structure.after)]
        products = {name: product_of(owner._modules[name]) for owner, name in (*first, *second)}
        # Where the down-projection's output is only added to the stream, its value makes no difference to a gradient.
        self.tape = _Tape(products, plan.outputs, () if self.structure.after else (_DOWN,))
        self.repeats_random = layer.training and None in products.values()
        self.before = _trained(norms, first, products)
        self.after = _trained(others, second, products)
        self.parameters = (*self.before, *self.after)
        self.edge: GradientEdge | None = None
        self.out: Kept | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Compute the layer without autograd and keep what the plan says."""
        self.autocast, self.routing = _Autocast(h.device.type), routing_again()
        self.previous, self.shared.previous = self.shared.previous, weakref.ref(self)
        self.stream = self._keep(h.detach())
        dropout = self.attention.attention_dropout if self.layer.training else 0.0
        before = _random_state(h.device, self.repeats_random)
        heads = self._heads(h)
        self.random_in_attention = _random_state(h.device, dropout > 0)
        out = self._attend(*heads)
        del heads
        self.random = before, _random_state(h.device, self.repeats_random)
        total, y = self._second_half(h, out)
        del out
        self.tape.replaying = True
        return total.add_(y) if total.dtype == y.dtype else total + y

    def backward(self, d_out: Tensor, want_dh: bool) -> list[Tensor | None]:
        """Gradients of the input and of the parameters."""
        h = self.stream.take()
        out = None if self.out is None else self.out.take()
        previous = None if self.previous is None else self.previous()
        if previous is not None:
            previous.prefetch()
        first, ends = h.detach().requires_grad_(), None
        if out is None:
            with self._recomputing(0):
                heads = self._heads(first)
                with _with_random_state(self.random_in_attention):
                    ends = fused.attend(self.attention, self.own, *heads, **self.kwargs)[0]
            del heads
            out = ends.detach()
        d_attention, dh, *d_after = self._second_half_backward(h, out, d_out)
        if not (want_dh or self.before) or d_attention is None:
            return [dh, *(None for _ in self.before), *d_after]
        if ends is not None:
            outputs, grads = [ends], [d_attention]
        else:
            with self._recomputing(0):
                heads = self._heads(first)
            outputs, grads = self._attention_backward(heads, out, d_attention)
        del out, d_attention, ends
        through, *d_before = torch.autograd.grad(outputs, (first, *self.before), grads, allow_unused=True)
        if through is not None:
            dh = through if dh is None else dh + through
        return [dh, *d_before, *d_after]

    def prefetch(self) -> None:
        """Have what waits in host memory brought back."""
        self.stream.prefetch()
        if self.out is not None:
            self.out.prefetch()

    # The halves.

    def _heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.layer.input_layernorm(h)
        return fused.query_key_value(self.attention, self.own, x, self.positions, self.tape)

    def _second_half(self, h: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = project(self.attention, (_OUT,), out, self.tape)
        x, total = fused.after_attention(self.layer, self.structure, h, x)
        x = fused.mlp_hidden(self.mlp, self.gated, x, self.tape)
        (y,) = project(self.mlp, (_DOWN,), x, self.tape)
        return total, fused.after_mlp(self.layer, self.structure, y)

    def _second_half_backward(self, h: Tensor, out: Tensor, d_out: Tensor) -> Sequence[Tensor | None]:
        h, out = h.detach().requires_grad_(), out.detach().requires_grad_()
        with self._recomputing(1):
            total, y = self._second_half(h, out)
        grads = (d_out.to(total.dtype), d_out.to(y.dtype))
        return torch.autograd.grad((total, y), (out, h, *self.after), grads, allow_unused=True)

    @contextmanager
    def _recomputing(self, half: int) -> Iterator[None]:
        with torch.enable_grad(), self.autocast.again(), self.routing(), _with_random_state(self.random[half]):
            yield

    # Attention.

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run attention; keep its node without its inputs, and its output."""
        if not self.plan.attention:
            return fused.attend(self.attention, self.own, q, k, v, **self.kwargs)[0]
        node = _AttentionNode()
        with torch.enable_grad(), saved_tensors_hooks(node.pack, _unpack):
            ports = [_Port.apply(node.anchor, head, node.grads, i) for i, head in enumerate((q, k, v))]  # type: ignore[no-untyped-call]
            out = fused.attend(self.attention, self.own, *ports, **self.kwargs)[0]
            edge = get_gradient_edge(out)
        out = out.detach()
        extra = node.forget({"q": q, "k": k, "v": v, "out": out}, self.kwargs.get("attention_mask"))
        if extra <= out.nbytes:
            self.edge, self.node, self.out = edge, node, self._keep(out)
        return out

    def _attention_backward(
        self, heads: tuple[Tensor, Tensor, Tensor], out: Tensor, d_out: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Put the recomputed inputs back into attention's node and run it."""
        assert self.edge is not None
        node, edge, self.edge = self.node, self.edge, None
        node.sources.update(zip("qkv", (head.detach() for head in heads), strict=True), out=out)
        torch.autograd.grad(edge, node.anchor, d_out, allow_unused=True)  # type: ignore[arg-type]
        node.sources.clear()
        pairs = [(head, grad) for head, grad in zip(heads, node.grads, strict=True) if grad is not None]
        return [head for head, _ in pairs], [grad for _, grad in pairs]

    def _keep(self, tensor: Tensor) -> Kept:
        return self.shared.shelf.put(tensor) if self.plan.offload else Here(tensor)


class _Tape:
    """Runs a layer's linear layers: the forward remembers what the backward replays."""

    def __init__(self, products: dict[str, Product | None], keep: frozenset[str], unread: tuple[str, ...]) -> None:
        self._products, self._keep, self._unread = products, keep, unread
        self._seen: dict[tuple[str, ...], Seen] = {}
        self.replaying = False

    def linear(self, owner: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        """Apply the linear layers that stand in ``owner`` under ``names``, together where they can be."""
        products = sharing([self._products[name] for name in names])
        if products is not None:
            return self._apply(names, products, x)
        outputs: list[Tensor] = []
        for name in names:
            product = self._products[name]
            outputs += [getattr(owner, name)(x)] if product is None else self._apply((name,), [product], x)
        return outputs

    def _apply(self, names: tuple[str, ...], products: list[Product], x: Tensor) -> list[Tensor]:
        if self.replaying:
            return replay(products, x, self._seen.pop(names))
        keep, is_read = all(name in self._keep for name in names), any(name not in self._unread for name in names)
        ys, self._seen[names] = run(products, x, keep, is_read)
        return ys

    def owns(self, names: tuple[str, ...]) -> bool:
        """Whether the outputs of these layers are made for one backward, which may write over them."""
        return self.replaying and all(self._products[name] is not None for name in names)


class _AttentionNode:
    """What attention saved for its backward, with its inputs and output taken out."""

    def __init__(self) -> None:
        self.anchor = torch.empty(0, requires_grad=True)
        self.grads: list[Tensor | None] = [None, None, None]
        self.sources: dict[str, Tensor] = {}
        self._boxes: list[_Box] = []

    def pack(self, tensor: Tensor) -> _Box:
        """Take a tensor that autograd saves."""
        box = _Box(tensor, self.sources)
        self._boxes.append(box)
        return box

    def forget(self, sources: dict[str, Tensor], mask: Tensor | None) -> int:
        """Let go of saved tensors that are views of these; gives the bytes held besides them and the mask."""
        # The output may come back from host memory as a tensor of its own; a view of it must then mean the same.
        places = {_place(tensor): name for name, tensor in sources.items() if name != "out" or _is_whole(tensor)}
        held = {} if mask is None else {_place(mask): 0}
        for box in self._boxes:
            assert box.tensor is not None
            place = _place(box.tensor)
            if place in places:
                box.forget(places[place])
            else:
                held.setdefault(place, box.tensor.untyped_storage().nbytes())
        self._boxes.clear()
        return sum(held.values())


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


class _Box:
    """Stands for a tensor that autograd saved: the tensor, or how to see it in another one."""

    def __init__(self, tensor: Tensor, sources: dict[str, Tensor]) -> None:
        self.tensor: Tensor | None = tensor
        self._sources = sources
        self._view: Any = None

    def forget(self, source: str) -> None:
        """Keep the geometry alone."""
        assert self.tensor is not None
        self._view = source, self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset()
        self.tensor = None

    def open(self) -> Tensor:
        """The tensor."""
        if self.tensor is not None:
            return self.tensor
        source, *geometry = self._view
        return self._sources[source].as_strided(*geometry)


def _unpack(box: _Box) -> Tensor:
    return box.open()


class _Port(torch.autograd.Function):
    """Where an inner graph begins that does not hold its inputs; the gradient that arrives is put into a list."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor, grads: list[Tensor | None], index: int) -> Tensor:
        ctx.grads, ctx.index = grads, index
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.grads[ctx.index] = grad
        return None, None, None, None


class _Autocast:
    """The autocast that is on now, to be on again in backward."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None

    def again(self) -> AbstractContextManager[Any]:
        """Switch it on, or nothing where it was off."""
        return nullcontext() if self._dtype is None else torch.autocast(self._device_type, self._dtype)


def _random_state(device: torch.device, wanted: bool) -> tuple[Tensor, Tensor | None, torch.device] | None:
    if not wanted:
        return None
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, device


@contextmanager
def _with_random_state(state: tuple[Tensor, Tensor | None, torch.device] | None) -> Iterator[None]:
    """Draw from a state that was captured, and leave the generators as they are now."""
    if state is None:
        yield
        return
    cpu, cuda, device = state
    with torch.random.fork_rng([] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield


def _trained(
    modules: Sequence[Any], sites: Sequence[tuple[Any, str]], products: dict[str, Product | None]
) -> tuple[Tensor, ...]:
    """Parameters with a gradient, each once."""
    found = [p for module in modules for p in module.parameters()]
    for owner, name in sites:
        product = products[name]
        found += owner._modules[name].parameters() if product is None else product.parameters
    return tuple(dict.fromkeys(p for p in found if p.requires_grad))
