"""What a training step takes of a device's memory, by formulas, before anything is loaded.

Sizes of a model: d hidden, f inside the MLP, e experts of a token, q and k the widths of queries and keys, h heads, L
layers, v vocabulary; T tokens a step, s bytes of an activation. Each formula stands with the function that computes it.
What is added up is what is alive at the same time, at the four moments of a step at which most is:

    loss        everything that is kept for backward, and a chunk of logits
    last layer  everything that is kept, and the last layer's backward
    first layer nearly all gradients, and the first layer's backward
    step        all gradients and the optimizer's state

tests/recipes/test_estimate.py holds these beside the tensors of real steps, and bench/LOG.md has peaks of an H100.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fastpeft.methods import AdapterConfig, FullConfig
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.models.plan import LayerBytes, Planner
from fastpeft.nn.experts import is_experts
from fastpeft.ops.linear_loss import chunk_rows
from fastpeft.optim.adamw8bit import MIN_8BIT_SIZE
from fastpeft.optim.placement import CELL_BYTES
from fastpeft.recipes.estimate_adapter import Trained, trained
from fastpeft.recipes.estimate_model import ModelShape, WeightBytes, weight_bytes

Mode = Literal["full", "selective", "offload", "none"]
_MASTER = 4  # bytes of an adapter's numbers and of their gradients
_NF4_WORKSPACE = 32 << 20  # of an NF4 product on CUDA
_CUBLAS_WORKSPACE = 32 << 20
_SLOTS = 3  # of the copy pipeline of paged state
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        method: what trains.
        quantize: whether the base is NF4.
        block_size: of NF4.
        double_quant: of NF4.
        skip_modules: layers that stay dense.
        itemsize: bytes of an activation.
        weight_itemsize: bytes of a dense weight; where it differs, the model runs under autocast, which holds a copy of
            all dense weights in the dtype of the activations.
        optimizer: "adamw", "adamw_8bit", "paged_adamw" or "paged_adamw_8bit"; others count as "adamw".
        optim_budget: bytes of paged state that may be on the device; None: what is over, and so none is counted.
        batch: rows of a step.
        length: tokens of a row, virtual ones included.
        accumulation: steps whose gradients add up.
        checkpointing: what layers keep.
        activation_budget: of "selective", in bytes.
        fused: whether the model is accelerated.
        device: "cuda" or "cpu", which have workspaces of different sizes.
    """

    method: AdapterConfig
    quantize: bool = False
    block_size: int = 64
    double_quant: bool = True
    skip_modules: tuple[str, ...] = ()
    itemsize: int = 2
    weight_itemsize: int = 2
    optimizer: str = "adamw"
    optim_budget: int | None = None
    batch: int = 1
    length: int = 1024
    accumulation: int = 1
    checkpointing: Mode = "full"
    activation_budget: int | None = None
    fused: bool = True
    device: str = "cuda"


@dataclass(frozen=True)
class Estimate:
    """Bytes that a step takes.

    Attributes:
        trained: what trains.
        weights: of the base.
        adapters: the adapter's fp32 numbers, and what it keeps beside them.
        gradients: of everything that trains.
        optimizer: its state on the device.
        optimizer_host: its state in host memory.
        activations: kept for backward, on the device.
        activations_host: kept for backward, in host memory.
        layer: what the backward of one layer needs besides.
        loss: what head and loss need besides.
        workspace: of products.
        moments: what is alive on the device at each moment of a step.
    """

    trained: Trained
    weights: WeightBytes
    adapters: int
    gradients: int
    optimizer: int
    optimizer_host: int
    activations: int
    activations_host: int
    layer: int
    loss: int
    workspace: int
    moments: dict[str, int]

    @property
    def total(self) -> int:
        """The most that is alive at once on the device."""
        return max(self.moments.values())

    @property
    def when(self) -> str:
        """The moment of that."""
        return max(self.moments, key=lambda moment: self.moments[moment])


def estimate(shape: ModelShape, setting: Setting) -> Estimate:
    """Add up what training takes.

    Args:
        shape: the model.
        setting: how it is trained.
    Raises:
        UserError: the method does not fit the model.
    """
    what = trained(shape.skeleton, setting.method)
    loftq = isinstance(setting.method, LoraConfig) and setting.method.init_lora_weights == "loftq"
    skip = list(setting.skip_modules)
    if loftq and not setting.quantize:  # it packs what it adapts, and experts it does not
        skip += [name for name, module in shape.skeleton.named_modules() if is_experts(module)]
    weights = weight_bytes(
        shape, setting.weight_itemsize, setting.quantize or loftq, setting.block_size, setting.double_quant, skip
    )
    own = what.numbers - what.added  # the model's numbers that train, or copies of them
    copies = 0 if isinstance(setting.method, FullConfig) else own * setting.weight_itemsize
    adapters = _MASTER * what.added + what.beside + copies
    gradients = _MASTER * what.added + setting.weight_itemsize * own
    state, state_host = optimizer_bytes(setting, what.numbers)

    tokens = setting.batch * setting.length
    kept = kept_bytes(shape, setting, what, tokens)
    layer = setting.itemsize * tokens * _layer_work(shape, setting, what, kept.last)
    loss = loss_bytes(shape, setting, tokens)
    workspace = 0 if setting.device == "cpu" else _CUBLAS_WORKSPACE + (_NF4_WORKSPACE if setting.quantize else 0)

    if setting.weight_itemsize != setting.itemsize:
        workspace += weights.dense // setting.weight_itemsize * setting.itemsize

    base = weights.total + adapters + state + workspace
    before = gradients if setting.accumulation > 1 else 0  # of earlier micro-batches
    head = max(before, what.largest * setting.weight_itemsize)
    a_layer = (
        (gradients - 2 * what.largest * setting.weight_itemsize) // shape.layers if own else gradients // shape.layers
    )
    late = max(before, gradients - what.largest * setting.weight_itemsize - a_layer // 2)
    moments = {
        "the loss": base + kept.device + loss + (head if what.largest else before),
        "the last layer's backward": base + kept.device + layer + head + (a_layer // 2 if own else 0),
        "the first layer's backward": base + kept.first + layer + late,
        "the optimizer's step": base + gradients,
    }
    return Estimate(
        what, weights, adapters, gradients, state, state_host, kept.device, kept.host, layer, loss, workspace, moments
    )


def optimizer_bytes(setting: Setting, numbers: int) -> tuple[int, int]:
    """State of AdamW on the device and on the host: 8 bytes a number, or with 8 bits 2 and 8 for each 256 of them.

    Paged state that the budget leaves no room for is on the host, and three slots of 16 MiB on the device.

    Args:
        setting: how the model is trained.
        numbers: that train.
    """
    eight_bit = setting.optimizer.endswith("8bit") and numbers >= MIN_8BIT_SIZE
    state = 2 * numbers + numbers // 32 if eight_bit else 8 * numbers
    if not setting.optimizer.startswith("paged"):
        return state, 0
    near = min(state, setting.optim_budget or 0)
    return near + min(state - near, _SLOTS * CELL_BYTES), state - near


@dataclass(frozen=True)
class Kept:
    """What waits for backward.

    Attributes:
        device: bytes on the device when the forward is over.
        host: bytes in host memory.
        first: bytes on the device when only the first layer is left.
        last: how much of the last layer is kept: "all", "outputs" of products, or "input".
    """

    device: int
    host: int
    first: int
    last: Literal["all", "outputs", "input"]


def kept_bytes(shape: ModelShape, setting: Setting, what: Trained, tokens: int) -> Kept:
    """Activations kept between forward and backward.

    ``full`` keeps of each layer s (d + q) + 4 h bytes a token, its input and attention's output with the log-sum-exp;
    only s d where adapters hook into it. ``selective`` adds the outputs of projections, s (q + 2 k + d + 2 f), as far
    as the budget goes, and ``offload`` has all layers' but two on the host. ``none`` keeps s (d + 2 q + 2 k) + 4 h
    a token, s f for the gate and s f for the up-projection; where inputs of products are needed, s (3 d + f) more; with
    bottleneck adapters s d more a site, with (IA)^3 2 s f. Without fused layers there are s f more for the activation
    function, 8 d a norm for its fp32 values where s is 2, and checkpointing keeps s d.

    A mixture keeps s e d for the gradient of the shares, and of the inputs of products attention's, s 2 d, and with
    adapters beside the experts s (e d + f) more; packed or adapted experts compute the activation function again.

    Args:
        shape: the model.
        setting: how it is trained.
        what: what trains.
        tokens: T.
    """
    d, f, s = shape.hidden, shape.intermediate, setting.itemsize
    q, k, lse = shape.query_width, shape.key_width, 4 * shape.heads
    everything = s * (d + 2 * q + 2 * k + 2 * f) + lse
    everything += s * shape.experts * d
    if what.saves in ("inputs", "dora"):
        everything += s * (2 * d if shape.experts else 3 * d + f)
    if what.beside_experts:
        everything += s * (shape.experts * d + f)
    if not setting.fused:
        own_gate = not (what.beside_experts or (shape.experts and setting.quantize))
        everything += (s * f if own_gate else 0) + (16 * d if s == 2 else 0)
    everything += s * d * what.sites // shape.layers + (2 * s * f if what.saves == "scaled" else 0)
    if setting.checkpointing == "none":
        return Kept(shape.layers * everything * tokens, 0, everything * tokens, "all")
    whole = what.saves == "whole layer" or not setting.fused
    sizes = LayerBytes(
        stream=s * d,
        attention=0 if whole else s * q + lse,
        outputs={} if whole else dict(zip(_PROJECTIONS, (s * q, s * k, s * k, s * d, s * f, s * f), strict=True)),
        rest=s * (3 * d + q + k + f),
    )
    mode = "full" if whole and setting.checkpointing == "selective" else setting.checkpointing
    planner = Planner(mode, setting.activation_budget, shape.layers)
    plans = planner.decide(sizes, tokens)
    last: Literal["all", "outputs", "input"] = "input"
    if (ends := plans[-1]) is None or len(ends.outputs) == len(_PROJECTIONS):
        last = "all" if ends is None else "outputs"
    layers = []
    for plan in plans:
        if plan is None:
            layers.append(everything * tokens)
            continue
        attention = sizes.attention if plan.attention else 0
        layers.append((sizes.stream + attention + sum(sizes.outputs.get(name, 0) for name in plan.outputs)) * tokens)
    if setting.checkpointing == "offload" and not whole:
        near = sum(layers[-2:])  # the last layer's, and the one before is being fetched
        return Kept(near, sum(layers[:-1]), near, last)
    return Kept(sum(layers), 0, layers[0], last)


def _layer_work(shape: ModelShape, setting: Setting, what: Trained, kept: str) -> int:
    """Activations that the backward of one layer needs at once besides what is kept, in numbers a token.

    The half with the MLP is the larger one: its gradient coming in, the sum of the stream and its norm, 3 d; gate, up
    and the gradient of their product, 3 f, and the product where the down-projection's input is needed, f, which
    (IA)^3 has twice, with a gradient. ``selective`` has gate and up already. Where a layer is not recomputed the
    gradients of gate and up have memory of their own. DoRA keeps two values beside each output. Layers that are
    recomputed whole have all activations of ``none``.
    """
    d, f = shape.hidden, shape.intermediate
    product = {"nothing": 0, "whole layer": 0, "scaled": 3 * f}.get(what.saves, f)
    if kept == "all":
        return d + 3 * f - min(product, f)
    if what.saves == "whole layer" or not setting.fused:
        inside = dataclasses.replace(setting, checkpointing="none")
        return kept_bytes(shape, inside, what, 1).first // setting.itemsize + d + 3 * f
    work = 3 * d + 3 * f + product
    if kept == "outputs":
        work -= 2 * f
    return work + (2 * (2 * f + 2 * d) + f if what.saves == "dora" else 0)


def loss_bytes(shape: ModelShape, setting: Setting, tokens: int) -> int:
    """What head and loss need: the last layer's output, its norm and its gradient, 3 T d s, and logits.

    Fused they are a chunk of at most 512 MiB (32 MiB on a CPU); else T v of them in fp32, three times.

    Args:
        shape: the model.
        setting: how it is trained.
        tokens: T.
    """
    stream = 3 * tokens * shape.hidden * setting.itemsize
    if not setting.fused:
        return stream + 12 * tokens * shape.vocabulary
    row = shape.vocabulary * setting.itemsize
    return stream + chunk_rows(tokens, row, setting.device) * row
