"""One parameter's state as it stands in state dicts: torch.optim.AdamW's, and bitsandbytes'.

torch         step, exp_avg, exp_avg_sq
bitsandbytes  step, state1, state2; for 8 bits also absmax1, absmax2 (a scale for each 256 elements) and qmap1, qmap2
              (the value of each code), since 0.46 the tensors in a dict of their own, so that FSDP does not gather them

Either is read by every optimizer here, whatever its own layout: `Moments` is what both come down to.

Source: torch/optim/adam.py of torch 2.13; bitsandbytes/optim/optimizer.py of bitsandbytes 0.50.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.adamw import dynamic_map

BLOCK = 256  # elements that share a scale of 8-bit state
_BNB_WRAPPED = "__bnb_optimizer_quant_state__"
_READ_CHUNK = 1 << 22  # elements converted at once, a multiple of the block


@dataclass(frozen=True)
class Moments:
    """The moments of one parameter, flat: float32, or uint8 codes with their scales.

    Attributes:
        exp_avg: the first moment.
        exp_avg_sq: the second moment.
        absmax: scales of the first moment's blocks; None for float32.
        absmax_sq: scales of the second moment's blocks; None for float32.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    absmax: Tensor | None = None
    absmax_sq: Tensor | None = None

    @property
    def eight_bit(self) -> bool:
        """Whether they are codes."""
        return self.absmax is not None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        given = (self.exp_avg, self.exp_avg_sq, self.absmax, self.absmax_sq)
        return tuple(tensor for tensor in given if tensor is not None)


@dataclass(frozen=True)
class Saved:
    """What an entry of a state dict holds, checked, and not yet converted.

    Attributes:
        step: how many steps the parameter has taken.
        moments: its moments, as they were saved.
        maps: the values of the codes of either moment, where they are not those of `dynamic_map`.
    """

    step: float
    moments: Moments
    maps: tuple[Tensor, Tensor] | None = None

    def as_float32(self) -> Moments:
        """The moments in float32."""
        moments = self.moments
        if moments.absmax is None or moments.absmax_sq is None:
            return moments
        first, second = self.maps or (dynamic_map(True), dynamic_map(False))
        return Moments(
            decode(moments.exp_avg, moments.absmax, first), decode(moments.exp_avg_sq, moments.absmax_sq, second)
        )

    def as_eight_bit(self) -> Moments:
        """The moments as codes of `dynamic_map`; codes that are so already stay as they are."""
        if self.moments.eight_bit and self.maps is None:
            return self.moments
        moments = self.as_float32()
        exp_avg, absmax = encode(moments.exp_avg, dynamic_map(True))
        exp_avg_sq, absmax_sq = encode(moments.exp_avg_sq, dynamic_map(False))
        return Moments(exp_avg, exp_avg_sq, absmax, absmax_sq)


def blocks(numel: int) -> int:
    """How many scales the 8-bit state of so many elements has."""
    return -(-numel // BLOCK)


def decode(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """float32 of flat codes: each code's value times the scale of its block."""
    out = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    values = values.to(codes.device)
    for begin in range(0, codes.numel(), _READ_CHUNK):
        chunk = codes[begin : begin + _READ_CHUNK]
        scale = absmax[begin // BLOCK : blocks(begin + chunk.numel())].repeat_interleave(BLOCK)[: chunk.numel()]
        torch.mul(values[chunk.int()], scale, out=out[begin : begin + chunk.numel()])
    return out


def encode(moment: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest values, and the scales, of a flat float32 moment."""
    codes = torch.empty(moment.numel(), dtype=torch.uint8, device=moment.device)
    absmax = torch.zeros(blocks(moment.numel()), dtype=torch.float32, device=moment.device)
    values = values.to(moment.device)
    middles = (values[1:] + values[:-1]) / 2
    for begin in range(0, moment.numel(), _READ_CHUNK):
        chunk = moment[begin : begin + _READ_CHUNK]
        count = blocks(chunk.numel())
        padded = torch.nn.functional.pad(chunk, (0, count * BLOCK - chunk.numel())).view(count, BLOCK)
        largest = padded.abs().amax(dim=1)
        absmax[begin // BLOCK : begin // BLOCK + count] = largest
        relative = padded / torch.where(largest > 0, largest, 1.0)[:, None]
        codes[begin : begin + chunk.numel()] = torch.bucketize(relative, middles).flatten()[: chunk.numel()]
    return codes, absmax


def read(entry: Mapping[str, Any], shape: torch.Size, what: str) -> Saved:
    """Check and read one parameter's entry of a state dict.

    Args:
        entry: in torch's or in bitsandbytes' layout.
        shape: of the parameter, or of this process's part of it.
        what: names the optimizer and the parameter, for messages.
    Returns:
        What it holds; tensors are those of the entry, flat, not copied.
    Raises:
        ValueError: a key is missing, or a tensor has another size or dtype than it must have.
    """
    entry = {**entry, **entry.get(_BNB_WRAPPED, {})}
    if "max_exp_avg_sq" in entry:
        raise ValueError(f"{what}: the state dict has max_exp_avg_sq (amsgrad), which is not kept here")
    first, second = ("state1", "state2") if "state1" in entry else ("exp_avg", "exp_avg_sq")
    eight_bit = getattr(entry.get(first), "dtype", None) == torch.uint8
    keys = ["step", first, second, *(["absmax1", "absmax2"] if eight_bit else [])]
    missing = [key for key in keys if key not in entry]
    if missing:
        has = ", ".join(map(str, entry)) or "nothing"
        raise ValueError(f"{what}: the state dict lacks {' and '.join(missing)} of it; it has {has}")

    def flat(key: str, dtype: torch.dtype | None, size: int) -> Tensor:
        tensor = local(entry[key])
        if not isinstance(tensor, Tensor) or (tensor.dtype != dtype if dtype else not tensor.is_floating_point()):
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{what}: {key} of the state dict is {kind}; it must be {dtype or 'floating point'}")
        wanted = shape if key in (first, second) else torch.Size([size])
        if tensor.shape != wanted:
            has = tuple(tensor.shape)
            raise ValueError(f"{what}: {key} of the state dict has shape {has}; it must be {tuple(wanted)}")
        return tensor.detach().reshape(-1)

    numel, step = shape.numel(), entry["step"]
    try:
        taken = float(step)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: step of the state dict is {step!r}; it must be a number") from error
    if not (taken >= 0 and taken % 1 == 0):
        raise ValueError(f"{what}: step of the state dict is {taken:g}; it must be a whole number of 0 or more")
    if not eight_bit:
        return Saved(taken, Moments(*(flat(key, None, numel).float() for key in (first, second))))
    codes = [flat(key, torch.uint8, numel) for key in (first, second)]
    scales = [flat(key, torch.float32, blocks(numel)) for key in ("absmax1", "absmax2")]
    maps = None
    if "qmap1" in entry and "qmap2" in entry:
        given = flat("qmap1", torch.float32, 256), flat("qmap2", torch.float32, 256)
        usual = dynamic_map(True), dynamic_map(False)
        if not all(torch.equal(one.cpu(), other) for one, other in zip(given, usual, strict=True)):
            maps = given
    return Saved(taken, Moments(*codes, *scales), maps)


def write(step: Tensor, moments: Moments, shape: torch.Size, bitsandbytes: bool) -> dict[str, Any]:
    """Give one parameter's entry of a state dict.

    Args:
        step: how many steps it has taken, a float32 scalar on the CPU.
        moments: its moments, flat.
        shape: of the parameter.
        bitsandbytes: use bitsandbytes' names, as 8-bit optimizers do for their small float32 moments too.
    """
    exp_avg, exp_avg_sq = moments.exp_avg.view(shape), moments.exp_avg_sq.view(shape)
    if not bitsandbytes:
        return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    # bitsandbytes casts a step that is a tensor to the parameter's dtype; bfloat16 loses odd numbers above 256.
    entry: dict[str, Any] = {"step": int(step), "state1": exp_avg, "state2": exp_avg_sq}
    if moments.absmax is not None:
        maps = {
            f"qmap{1 + index}": dynamic_map(signed).to(exp_avg.device) for index, signed in enumerate((True, False))
        }
        entry |= {"absmax1": moments.absmax, "absmax2": moments.absmax_sq, **maps}
    return entry


def local(tensor: Any) -> Any:
    """This process's part of a distributed tensor; anything else as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
