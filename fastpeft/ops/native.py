"""The border to the native core: the only file that imports ``fastpeft._C``.

Tensors go in as addresses. Each call runs on the device of its tensors, on the caller's stream (CUDA) or with as many
threads as torch uses (CPU). Reading the raw stream costs 0.3 us where ``torch.cuda.current_stream()`` costs 15.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from fastpeft import _C  # type: ignore[attr-defined]
except ImportError as error:
    source = Path(__file__).parents[2]
    if (source / "csrc").is_dir():
        advice = (
            f"Python found the source folder {source}, where it is not built, before any installed copy: start in "
            "another folder, or build it here with: pip install --editable ."
        )
    else:
        advice = "Install the package again from its source folder: pip install --force-reinstall --no-deps ."
    raise ImportError(f"fastpeft's native core could not be loaded ({error}). {advice}") from error

# Numbers of fastpeft::DType (csrc/include/fastpeft/types.h).
_DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

LIBRARY = torch.library.Library("fastpeft", "DEF")


def build_info() -> dict[str, Any]:
    """Say how the native core was built.

    Returns:
        ``version``, ``cuda`` (compiled or not), ``cuda_version``, ``cuda_archs`` (a list such as 80, 90a, ptx90),
        ``compiler`` and ``cpu_features`` (the vector units in use here).
    """
    return dict(_C.build_info())


def nf4_levels() -> list[float]:
    """The sixteen NF4 levels, by code."""
    levels: list[float] = _C.nf4_levels()
    return levels


def dynamic_map(signed: bool) -> list[float]:
    """The 256 values of an 8-bit dynamic map, by code, ascending."""
    values: list[float] = _C.dynamic_map(signed)
    return values


ADAMW_SUMS: int = _C.ADAMW_SUMS  # float32 words that the norm of gradients works in


def adamw_list(*arguments: Any) -> Any:
    """Tensors that AdamW steps together, as the native core knows them (csrc/include/fastpeft/adamw.h)."""
    return _C.AdamWList(*arguments)


def arena(nbytes: int, managed: bool, slot_bytes: int) -> Any:
    """Pages of device or host memory on the current device (csrc/include/fastpeft/arena.h)."""
    return _C.Arena(nbytes, managed, slot_bytes)


def stream_context(device: torch.device) -> Any:
    """The caller's stream on a CUDA device, as native calls take it."""
    return _C.Context(stream=torch._C._cuda_getCurrentRawStream(device.index))


def host_bytes(address: int, nbytes: int, owner: object) -> Tensor:
    """Host memory of the native core as a uint8 tensor that keeps its owner alive."""
    buffer = (ctypes.c_ubyte * nbytes).from_address(address)
    buffer.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=torch.uint8)


def adamw_far_plan(adamw_list: Any, slot_bytes: int) -> list[Any]:
    """What travels in which slot when a list's state is on the host (csrc/cuda/adamw_far_plan.h).

    Returns:
        For each batch its copies, ``(host, slot, nbytes)``, and its rows, ``(row, offset, numel, param, exp_avg,
        exp_avg_sq, absmax, absmax_sq)``, with three slots in turns from address 0 on.
    """
    batches: list[Any] = _C.adamw_far_plan(adamw_list, slot_bytes)
    return batches


class LinearPlan(NamedTuple):
    """How a product with an NF4 weight is computed (csrc/cuda/nf4_linear_config.h)."""

    kernel: str  # "dequantise", "decode", "fragments", "tiles" or "mma"
    workspace_bytes: int
    counters: int  # 32-bit words, zero before and after
    can_add: bool  # to y, if the 8-bit scales are aligned
    reason: str


def nf4_linear_plan(
    m: int, n: int, k: int, transposed: bool, block_size: int, dtype: torch.dtype, aligned: bool, device: torch.device
) -> LinearPlan:
    """Which kernel multiplies by an NF4 weight of these sizes, what it needs, and why."""
    number = dtype_number("nf4_linear", dtype)
    return LinearPlan(*_C.nf4_linear_plan(m, n, k, transposed, block_size, number, aligned, *device_limits(device)))


class GroupPlan(NamedTuple):
    """Whether products of one input with several NF4 weights are one launch (csrc/cuda/nf4_linear_config.h)."""

    together: bool
    workspace_bytes: int
    counters: int  # 32-bit words, zero before and after


@lru_cache(maxsize=1024)
def nf4_linear_group_plan(m: int, n: tuple[int, ...], k: int, dtype: torch.dtype, device: torch.device) -> GroupPlan:
    """Whether NF4 weights of these sizes, of blocks of 64 with 8-bit scales, are multiplied by in one launch."""
    number = dtype_number("nf4_linear_group", dtype)
    return GroupPlan(*_C.nf4_linear_group_plan(m, n, k, number, *device_limits(device)))


class ExpertsPlan(NamedTuple):
    """Whether a kernel takes the products of a mixture's experts (csrc/cuda/nf4_experts_config.h)."""

    fused: bool
    workspace_bytes: int
    reason: str


@lru_cache(maxsize=1024)
def nf4_experts_plan(
    m: int,
    experts: int,
    n: int,
    k: int,
    transposed: bool,
    block_size: int,
    dtype: torch.dtype,
    aligned: bool,
    device: torch.device,
) -> ExpertsPlan:
    """Whether a kernel multiplies m tokens sorted by expert by NF4 weights of these sizes, what it needs, and why."""
    number, limits = dtype_number("nf4_linear_experts", dtype), device_limits(device)
    return ExpertsPlan(*_C.nf4_experts_plan(m, experts, n, k, transposed, block_size, number, aligned, *limits))


class LoraPlan(NamedTuple):
    """Whether kernels take LoRA linears that share x, and what they need (csrc/cuda/lora_linear_config.h)."""

    fused: bool
    beside: bool  # the products are told what could be made beside them; of that
    xa_beside: bool  # xa is made beside the first product instead of before
    dxa_beside: Sequence[bool]  # dxa and dB are, beside each
    da_beside: bool  # dA is, beside the longest, which comes last
    da_after: bool  # dA is made after the products
    forward_bytes: int  # of workspace for a product
    backward_bytes: int
    xa_bytes: int  # of workspace for what is made beside a product
    dxa_bytes: int
    sums_bytes: int  # for what is made before, free again before dx is written
    after_bytes: int  # for dA, if it is made after
    counters: int  # 32-bit words, zero before and after
    reason: str


@lru_cache(maxsize=1024)
def lora_linear_plan(
    m: int,
    k: int,
    n: tuple[int, ...],
    r: tuple[int, ...],
    block_sizes: tuple[int, ...],
    dtype: torch.dtype,
    aligned: bool,
    aligned_factors: bool,
    p: float,
    device: torch.device,
) -> LoraPlan:
    """Whether kernels take LoRA linears of these sizes over NF4 bases, what they need, and why."""
    number, limits = dtype_number("lora_linear", dtype), device_limits(device)
    return LoraPlan(*_C.lora_linear_plan(m, k, n, r, block_sizes, number, aligned, aligned_factors, p, *limits))


def lora_adapter(a: Tensor, b: Tensor, scale: float) -> object:
    """An adapter of contiguous float32 ``(r, k)`` and ``(n, r)`` (csrc/include/fastpeft/lora.h)."""
    n, r = b.shape
    return _C.LoraAdapter(a.data_ptr(), b.data_ptr(), n, r, scale)


@lru_cache(maxsize=1024)
def lora_few_floats(m: int, k: int, ranks: tuple[int, ...], dtype: torch.dtype, architecture: int) -> int:
    """Float32 words that ``lora_few_project`` writes; 0 for a call it does not take (csrc/cuda/lora_few_config.h)."""
    floats: int = _C.lora_few_floats(m, k, ranks, dtype_number("lora_few", dtype), architecture)
    return floats


def linear_adapter(
    xa: int,
    xa_pitch: int,
    factor: Tensor,
    rank: int,
    scale: float = 1.0,
    p: float = 0.0,
    seed: int = 0,
    add_to_y: bool = False,
    early: bool = False,
) -> Any:
    """An adapter that joins a product with an NF4 weight (csrc/include/fastpeft/nf4_linear.h)."""
    return _C.NF4LinearAdapter(xa, xa_pitch, factor.data_ptr(), rank, scale, p, seed, add_to_y, early)


@cache
def device_limits(device: torch.device) -> tuple[int, int, int, bool]:
    """Compute capability (90 for 9.0), multiprocessors, shared memory in bytes, and whether wgmma can be used."""
    found = torch.cuda.get_device_properties(device)
    smem_bytes: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    architecture = 10 * found.major + found.minor
    wgmma = architecture == 90 and "90a" in build_info()["cuda_archs"]
    return architecture, found.multi_processor_count, smem_bytes, wgmma


_COUNTER_WORDS = 1 << 20
_LEAST_WORDS = 2048
_MOST_CAPTURES = 8  # under way at a time, whose words are known
_counters: dict[tuple[int, ...], Tensor] = {}
_captured_counters: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
_counter_pools: dict[int, list[Tensor]] = {}


def counters(words: int, device: torch.device) -> Tensor:
    """Words that are zero and that no kernel running beside the caller's stream uses; kernels leave them zero.

    A stream has its own, and so has a stream of a capture, for ever, as the graph may be replayed on any stream; these
    come from a pool made by the first call outside a capture (it waits for the device, once).
    """
    index = device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.is_current_stream_capturing():
        return _counters_of_capture(words, device, (index, stream, _C.capture_id(stream_context(device))))
    if index not in _counter_pools:
        _counter_pools[index] = [torch.zeros(_COUNTER_WORDS, dtype=torch.int32, device=device)]
        torch.cuda.synchronize(device)
    key = (index, stream)
    if key not in _counters or _counters[key].numel() < words:
        _counters[key] = torch.zeros(max(words, _LEAST_WORDS), dtype=torch.int32, device=device)
    return _counters[key]


def _counters_of_capture(words: int, device: torch.device, key: tuple[int, ...]) -> Tensor:
    found = _captured_counters.get(key)
    if found is not None and found.numel() >= words:
        return found
    wanted = -(-max(words, _LEAST_WORDS) // 32) * 32
    pool = _counter_pools.get(device.index)
    if pool and pool[0].numel() >= wanted:
        taken, pool[0] = pool[0][:wanted], pool[0][wanted:]
    else:
        taken = torch.zeros(wanted, dtype=torch.int32, device=device)  # zeroed by each replay: correct, slower
    _captured_counters[key] = taken
    if len(_captured_counters) > _MOST_CAPTURES:
        _captured_counters.popitem(last=False)
    return taken


def dtype_number(function: str, dtype: torch.dtype) -> int:
    """Number of a dtype at the native border; ValueError names ``function`` when it has none."""
    if dtype not in _DTYPE_NUMBERS:
        raise ValueError(f"{function}: dtype {dtype} is not supported; use float32, float16 or bfloat16")
    return _DTYPE_NUMBERS[dtype]


def row_view(x: Tensor) -> Tensor:
    """``(..., width)`` as ``(rows, width)`` whose rows are contiguous, a copy only where no view is."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def paged_attention_plan(
    rows: int, heads: int, kv_heads: int, dim: int, most_tokens: int, device: torch.device
) -> tuple[int, int, int]:
    """Parts that rows are cut into on CUDA (csrc/cuda/paged_attention_config.h), float32 of workspace, and counters."""
    plan: tuple[int, int, int] = _C.paged_attention_plan(
        rows, heads, kv_heads, dim, most_tokens, *device_limits(device)
    )
    return plan


def sample_workspace_bytes(rows: int, v: int) -> int:
    """Bytes that a draw from rows of logits works in on CUDA (csrc/cuda/sample_config.h)."""
    nbytes: int = _C.sample_workspace_bytes(rows, v)
    return nbytes


def rms_norm_partial_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of partial sums that the backward of an RMSNorm needs for its weight's gradient."""
    sms = device_limits(device)[1] if device.type == "cuda" else 0
    partial_rows: int = _C.rms_norm_partial_rows(rows, width, dtype.itemsize, sms)
    return partial_rows


def logit_rows(
    logits: int,
    dtype: int,
    rows: int,
    v: int,
    stride: int,
    target: int,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
) -> object:
    """Rows of logits and what makes a loss of them (csrc/include/fastpeft/cross_entropy.h)."""
    return _C.LogitRows(logits, dtype, rows, v, stride, target, ignore_index, label_smoothing, logit_scale, softcap)


def address(tensor: Tensor | None) -> int:
    """Address of a contiguous tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def call(function: str, where: Tensor, *arguments: Any) -> None:
    """Run a native function on the device of ``where``; the context is appended to its arguments."""
    native: Callable[..., None] = getattr(_C, function)
    if where.device.type == "cpu":
        native(False, *arguments, _C.Context(threads=torch.get_num_threads()))
    elif where.device.type == "cuda":
        call_cuda(function, where, True, *arguments)
    else:
        raise ValueError(f"{function}: tensors are on {where.device}; only the CPU and CUDA devices are supported")


def call_cuda(function: str, where: Tensor, *arguments: Any) -> None:
    """Run a native function that only CUDA has; the context is appended to its arguments."""
    native: Callable[..., None] = getattr(_C, function)
    index, context = where.device.index, stream_context(where.device)
    if index == torch._C._cuda_getDevice():
        native(*arguments, context)
    else:
        with torch.cuda.device(index):
            native(*arguments, context)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``fastpeft::<schema>`` with one implementation for CPU and CUDA and its fake (shapes only)."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, implementation, "CPU")
    LIBRARY.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"fastpeft::{name}", fake, lib=LIBRARY)
