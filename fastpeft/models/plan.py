"""Which layer keeps what between forward and backward, within a budget of bytes.

Kept outputs of products save about the same time a byte, since a product over hidden size k costs k operations for each
byte of its output. So layers are filled one after another, and the last ones first: what they keep is freed soonest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from fastpeft.models.fused import STRUCTURE

logger = logging.getLogger(__name__)

Mode = Literal["full", "selective", "offload", "none"]
MODES: tuple[str, ...] = ("full", "selective", "offload", "none")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps besides its input.

    Attributes:
        outputs: names of the projections whose output is kept.
        attention: whether attention's output is kept, so that attention is not run again.
        offload: whether what is kept waits in host memory.
    """

    outputs: frozenset[str] = frozenset()
    attention: bool = True
    offload: bool = False


@dataclass(frozen=True)
class LayerBytes:
    """What the parts of a layer hold, in bytes a token.

    Attributes:
        stream: the residual stream, as the layer's input.
        attention: attention's output and log-sum-exp.
        outputs: of the projections that backward reads, by name.
        rest: what autograd keeps besides these when nothing is recomputed.
    """

    stream: int
    attention: int
    outputs: dict[str, int]
    rest: int


def measure(layer: nn.Module, hidden_size: int, itemsize: int) -> LayerBytes:
    """Read the sizes of a layer off its projections.

    Args:
        layer: a layer whose attention and MLP are fused.
        hidden_size: of the model.
        itemsize: bytes of an activation.
    """
    attention: Any = layer._modules["self_attn"]
    mlp: Any = layer._modules["mlp"]
    own, gated = attention.__dict__[STRUCTURE], mlp.__dict__[STRUCTURE]
    sites = [(attention, name) for name in (*own.projections, "o_proj")] + [(mlp, name) for name in gated.projections]
    outputs = {name: getattr(owner, name).out_features * itemsize for owner, name in sites}
    heads = own.widths[0] // own.head_dim
    act = mlp.down_proj.in_features * itemsize
    turned = (own.widths[0] + own.widths[1]) * itemsize
    return LayerBytes(
        stream=hidden_size * itemsize,
        attention=own.widths[0] * itemsize + 4 * heads,
        outputs=outputs,
        rest=3 * hidden_size * itemsize + turned + act,
    )


@dataclass
class Planner:
    """Decides what each layer keeps.

    Args:
        mode: as in ``accelerate``.
        budget_bytes: for what all layers keep together; None for as much as the mode likes.
        count: layers of the model.
    """

    mode: Mode
    budget_bytes: int | None
    count: int
    _plans: dict[Any, list[LayerPlan | None]] = field(default_factory=dict, repr=False)

    def plan(self, layer: nn.Module, index: int, hidden_states: Tensor) -> LayerPlan | None:
        """What a layer keeps for an input of this size; None where nothing is recomputed.

        Args:
            layer: the layer, taken as typical for all.
            index: its place.
            hidden_states: its input, ``(b, t, hidden)``.
        """
        key = (hidden_states.shape, hidden_states.dtype)
        if key not in self._plans:
            hidden_size = hidden_states.shape[-1]
            sizes = measure(layer, hidden_size, hidden_states.dtype.itemsize)
            self._plans[key] = self.decide(sizes, hidden_states.numel() // hidden_size)
        return self._plans[key][index]

    def decide(self, sizes: LayerBytes, tokens: int) -> list[LayerPlan | None]:
        """What each layer keeps for so many tokens.

        Args:
            sizes: of a layer.
            tokens: of the input.
        """
        if self.mode == "full":
            return [*[LayerPlan()] * self.count]
        if self.mode == "offload":
            return [*[LayerPlan(offload=True)] * (self.count - 1), LayerPlan()]  # the last is needed at once
        everything = frozenset(sizes.outputs)
        if self.budget_bytes is None:
            return [*[LayerPlan(everything)] * self.count]
        in_mlp = frozenset(name for name in sizes.outputs if name.startswith(("gate", "up")))
        steps: list[tuple[LayerPlan | None, int]] = [
            (LayerPlan(), sizes.attention),
            (LayerPlan(everything - in_mlp), sum(sizes.outputs[name] for name in everything - in_mlp)),
            (LayerPlan(everything), sum(sizes.outputs[name] for name in in_mlp)),
            (None, sizes.rest),
        ]
        plans: list[LayerPlan | None] = [LayerPlan(attention=False)] * self.count
        room = self.budget_bytes - self.count * sizes.stream * tokens
        if room < 0:
            logger.warning(
                "activation_budget_gb %.3g: the inputs of %d layers alone take %.3g GB; everything else is recomputed",
                *(self.budget_bytes / 1e9, self.count, self.count * sizes.stream * tokens / 1e9),
            )
        raised = self.count
        for plan, bytes_a_token in steps:
            raised = max(0, min(raised, int(room // max(1, bytes_a_token * tokens))))
            plans[self.count - raised :] = [plan] * raised
            room -= raised * bytes_a_token * tokens
        return plans
