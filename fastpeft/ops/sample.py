"""Drawing the next token of each row on its device, with all that a row's state needs for the one after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native


@dataclass
class SamplingState:
    """What a decoding loop keeps of its rows; every tensor has one entry a row, or one row a row.

    Attributes:
        temperature: float32, divides the logits; 0 takes the likeliest token.
        top_p: float32, the mass that is kept, of the likeliest; 1 keeps all.
        penalty: float32, of tokens that were seen; 1 is none.
        top_k: int32, how many of the likeliest are kept; 0 keeps all.
        least: int32, tokens before a stop token may be drawn.
        seed: int64; a row's tokens depend on its logits and its seed alone.
        drawn: int64, tokens that were drawn so far.
        lengths: int32, tokens in the cache; below 0 the row is idle.
        token: int64, the token drawn last.
        logprob: float32, its log-probability under ``softmax(logits / temperature)``, before penalty and cuts.
        seen: ``(rows, v)`` bool, which tokens the row has; None where no row has a penalty.
    """

    temperature: Tensor
    top_p: Tensor
    penalty: Tensor
    top_k: Tensor
    least: Tensor
    seed: Tensor
    drawn: Tensor
    lengths: Tensor
    token: Tensor
    logprob: Tensor
    seen: Tensor | None = None

    @classmethod
    def idle(cls, rows: int, device: torch.device) -> SamplingState:
        """Rows that nothing is drawn for."""
        made = {
            name: torch.zeros(rows, dtype=dtype, device=device)
            for name, dtype in _DTYPES.items()
            if dtype is not torch.bool
        }
        made["lengths"].fill_(-1)
        return cls(**made)

    def rows(self, count: int) -> SamplingState:
        """Views of the first rows."""
        return self.each(lambda x: x[:count])

    def each(self, change: Callable[[Tensor], Tensor]) -> SamplingState:
        """Another state, of what a function makes of each tensor."""
        made: dict[str, Any] = {name: getattr(self, name) for name in (field.name for field in fields(self))}
        changed: dict[str, Any] = {name: None if x is None else change(x) for name, x in made.items()}
        return SamplingState(**changed)


_DTYPES = {
    "temperature": torch.float32,
    "top_p": torch.float32,
    "penalty": torch.float32,
    "top_k": torch.int32,
    "least": torch.int32,
    "seed": torch.int64,
    "seen": torch.bool,
    "lengths": torch.int32,
    "drawn": torch.int64,
    "token": torch.int64,
    "logprob": torch.float32,
}
_IN_ORDER = ("temperature", "top_p", "penalty", "top_k", "least", "seed", "seen")


def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    penalty: Tensor,
    top_k: Tensor,
    least: Tensor,
    seed: Tensor,
    seen: Tensor | None,
    stop_ids: Tensor,
    lengths: Tensor,
    drawn: Tensor,
    token: Tensor,
    logprob: Tensor,
) -> None:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    partial = None
    if logits.is_cuda:
        partial = logits.new_empty(native.sample_workspace_bytes(*logits.shape), dtype=torch.uint8)
    native.call(
        "sample",
        logits,
        logits.data_ptr(),
        native.dtype_number("sample", logits.dtype),
        *logits.shape,
        logits.stride(0),
        *(native.address(x) for x in (temperature, top_p, penalty, top_k, least, seed, seen, stop_ids)),
        stop_ids.numel(),
        *(native.address(x) for x in (lengths, drawn, token, logprob, partial)),
    )


native.define(
    "sample(Tensor logits, Tensor temperature, Tensor top_p, Tensor penalty, Tensor top_k, Tensor least, Tensor seed, "
    "Tensor(a!)? seen, Tensor stop_ids, Tensor(b!) lengths, Tensor(c!) drawn, Tensor(d!) token, Tensor(e!) logprob) "
    "-> ()",
    _sample,
    lambda *_: None,
)


@torch.no_grad()
def sample_(logits: Tensor, state: SamplingState, stop_ids: Tensor) -> None:
    """Draw a token for each row that is not idle; ``token``, ``logprob``, ``drawn``, ``lengths``, ``seen`` move on.

    In this order, as transformers does it: the penalty divides positive logits of seen tokens and multiplies negative
    ones; stop tokens are barred from the first ``least`` draws; temperature; ``top_k``; ``top_p``. Of tokens that are
    equal at a cut all are kept. Equal logits, seeds and counts give equal tokens, in any batch.

    Args:
        logits: ``(rows, v)``, float32, float16 or bfloat16.
        state: of the rows, changed in place.
        stop_ids: ``(s,)`` int64.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit. Logits that are no numbers give a ``logprob`` of NaN.
    Source:
        top-p: arXiv 1904.09751; penalty: CTRL, arXiv 1909.05858; the generator: Philox, SC 2011.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample_: logits have shape {tuple(logits.shape)}; they must be (rows, v)")
    if stop_ids.dim() != 1 or stop_ids.dtype != torch.int64:
        raise ValueError(f"sample_: stop_ids are {stop_ids.dtype} of shape {tuple(stop_ids.shape)}; (s,) int64")
    rows, v = logits.shape
    for name, dtype in _DTYPES.items():
        x = getattr(state, name)
        if x is None and name == "seen":
            continue
        wanted = (rows, v) if name == "seen" else (rows,)
        if x.dtype != dtype or tuple(x.shape) != wanted or not x.is_contiguous():
            raise ValueError(
                f"sample_: {name} is {x.dtype} of shape {tuple(x.shape)}; it must be {dtype}, {wanted}, contiguous"
            )
        if x.device != logits.device:
            raise ValueError(f"sample_: logits are on {logits.device} and {name} on {x.device}; move them together")
    torch.ops.fastpeft.sample(
        logits,
        *(getattr(state, name) for name in _IN_ORDER),
        stop_ids.to(logits.device),
        state.lengths,
        state.drawn,
        state.token,
        state.logprob,
    )
