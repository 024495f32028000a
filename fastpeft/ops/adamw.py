"""AdamW over lists of tensors: the norm of all gradients, and a step in one launch.

Whatever a step needs lies in the device's memory (state, step counts, the table of tensors, the control), so that no
call waits for the device and steps can be captured into CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.arena import Arena

BLOCK = 256  # elements that share a scale of 8-bit state


def dynamic_map(signed: bool) -> Tensor:
    """The values of 8-bit state by code, as in bitsandbytes: ``(256,)``, float32, ascending, on the CPU.

    Args:
        signed: the map of first moments; else that of second moments.
    Source:
        8-bit optimizers via block-wise quantization, arXiv 2110.02861, section 1.3.
    """
    return torch.tensor(native.dynamic_map(signed), dtype=torch.float32)


class AdamWControl:
    """What a step found and does: 64 bytes on the device, filled by :func:`adamw_gradient_norm`.

    Attributes:
        tensor: the bytes.
        grad_norm: float32 scalar: norm of all gradients, unscaled, before clipping.
        grad_factor: float32 scalar: what a step multiplies gradients by. 1 until the norm is asked for.
        skip: int32 scalar: 1 when a step must write nothing, as the norm is not finite or an infinity was found.
        skipped: int64 scalar: how many steps were skipped.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(64, dtype=torch.uint8, device=device)
        self.grad_norm = self.tensor[0:4].view(torch.float32)[0]
        self.grad_factor = self.tensor[4:8].view(torch.float32)[0]
        self.skip = self.tensor[8:12].view(torch.int32)[0]
        self.skipped = self.tensor[16:24].view(torch.int64)[0]
        self.sums = torch.empty(native.ADAMW_SUMS, dtype=torch.float32, device=device)
        self.reset()

    def reset(self) -> None:
        """Make the next steps take gradients as they are and skip none, as before any norm was asked for."""
        self.grad_factor.fill_(1.0)
        self.skip.zero_()


class AdamWList:
    """Tensors of equal dtypes on one device that are stepped together, in one launch.

    A row is a whole parameter or a piece of one: it begins at element ``offsets[i]`` and has as many elements as its
    moments. Rows that share a step count (the same tensor) are pieces of one parameter, which a step counts once.

    Args:
        params: contiguous, float32, float16 or bfloat16, of one dtype, on one device.
        steps: float32 scalars on that device: how many steps each parameter has taken.
        exp_avgs: first moments, contiguous: float32, or uint8 codes of ``dynamic_map(True)``.
        exp_avg_sqs: second moments, of the same dtype; codes are of ``dynamic_map(False)``.
        absmaxes: of codes: float32 scales of the first moments, one for every block of 256 elements of a row.
        absmax_sqs: of codes: scales of the second moments.
        offsets: first element of each row in its parameter; 0 where not given. With codes, multiples of 256, so that
            pieces have the blocks of the whole.
        numbers: which parameter a row belongs to, for stochastic rounding: equal numbers round by equal random bits.
        advance: whether a step of this list counts the row's step. False where another list, stepped before this one,
            has a piece of the same parameter and counts it.
    Raises:
        ValueError: lists of different lengths, tensors that are not contiguous, of different dtypes or devices, or too
            short.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        absmaxes: Sequence[Tensor] | None = None,
        absmax_sqs: Sequence[Tensor] | None = None,
        *,
        offsets: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
        advance: Sequence[bool] | None = None,
    ) -> None:
        self._native, self.eight_bit = _native_list(
            params, steps, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs, offsets, numbers, advance
        )
        self.params = list(params)
        self._kept = [steps, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs]
        self._prepare()
        if params and params[0].is_cuda:
            table = torch.empty(self._native.table_bytes(), dtype=torch.uint8, device=params[0].device)
            self._native.set_table(table.data_ptr())
            self._kept.append([table])

    def _prepare(self) -> None:
        """What changes the list before its table is made."""

    def step(
        self,
        grads: Sequence[Tensor],
        control: AdamWControl,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        """Take one step, unless ``control`` says to skip it; then nothing is written.

        Args:
            grads: for each row the gradient of its whole parameter, contiguous, of one dtype.
            control: gradients are multiplied by its factor.
            lr: learning rate: a number, or a float32 scalar on the device, read there.
            betas: decay of the first and the second moment.
            eps: added to the root of the second moment.
            weight_decay: decoupled decay, multiplied by ``lr``.
            maximize: ascend instead of descend.
            stochastic_rounding: round to bfloat16 parameters up or down with the probability of the distances.
            seed: of the random numbers for it, together with the step count, number and index in the parameter.
        Raises:
            ValueError: a gradient whose size, dtype or device does not fit its parameter.
        Source:
            Decoupled weight decay regularization, arXiv 1711.05101, algorithm 2.
        """
        if not self.params:
            return
        _check_grads(grads, self.params)
        self.step_at(
            [grad.data_ptr() for grad in grads],
            grads[0].dtype,
            control,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )

    def step_at(
        self,
        grads: Sequence[int],
        grad_dtype: torch.dtype,
        control: AdamWControl,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        """`step` for a caller that has checked the gradients: looking at hundreds of tensors is most of its time.

        Args:
            grads: for each row the address of its whole parameter's gradient.
            grad_dtype: their dtype.
            control: as for `step`.
            lr: as for `step`.
            betas: as for `step`.
            eps: as for `step`.
            weight_decay: as for `step`.
            maximize: as for `step`.
            stochastic_rounding: as for `step`.
            seed: as for `step`.
        """
        where = self.params[0]
        on_device = isinstance(lr, Tensor) and lr.device == where.device
        if on_device and (lr.dtype != torch.float32 or lr.numel() != 1):  # type: ignore[union-attr]
            raise ValueError("adamw: lr on the device must be one float32")
        native.call(
            "adamw_step",
            where,
            self._native,
            grads,
            native.dtype_number("adamw", grad_dtype),
            control.tensor.data_ptr(),
            0.0 if on_device and where.is_cuda else float(lr),
            lr.data_ptr() if on_device and where.is_cuda else 0,  # type: ignore[union-attr]
            betas[0],
            betas[1],
            eps,
            weight_decay,
            maximize,
            stochastic_rounding,
            seed & 0xFFFFFFFFFFFFFFFF,
        )


class AdamWFarList(AdamWList):
    """The same for rows whose state lies on the host: it travels to the device and back through the arena's slots.

    While one piece is stepped in a slot of device memory, the state of the next comes in and that of the one before
    goes out, each on a stream of its own behind and before the work of the caller's stream. State that lies in one
    range of addresses is copied at once.

    Args:
        arena: whose slots are used. A step must not run beside another through the same arena.
        params: and all others: as for :class:`AdamWList`, the moments and scales being views of host pages.
    """

    def __init__(
        self,
        arena: Arena,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        absmaxes: Sequence[Tensor] | None = None,
        absmax_sqs: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.arena = arena
        super().__init__(params, steps, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs, **options)

    def _prepare(self) -> None:
        self.arena.stage(self._native)


def adamw_gradient_norm(
    grads: Sequence[Sequence[Tensor]],
    control: AdamWControl,
    *,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Measure the norm of all gradients and set what the next steps do with them, on the device.

    Sets ``control.grad_norm``, ``grad_factor`` (clipping to ``max_norm`` over the loss's scale) and ``skip``, and
    counts skipped steps. The same gradients give the same bits.

    Args:
        grads: lists of contiguous gradients, each list of one dtype, all on one device; whole ones, each once.
        control: what is filled.
        max_norm: gradients of a larger norm are scaled down to it, as ``torch.nn.utils.clip_grad_norm_`` does.
        grad_scale: float32 scalar on the device by which the loss was multiplied.
        found_inf: float32 scalar on the device; the step is skipped where it is not 0.
    Raises:
        ValueError: gradients that are not contiguous, or of mixed dtypes or devices in a list.
    """
    for tensors in grads:
        for grad in tensors:
            if not grad.is_contiguous() or grad.is_sparse or grad.dtype != tensors[0].dtype:
                raise ValueError(
                    f"adamw_gradient_norm: a gradient of shape {tuple(grad.shape)} is {grad.dtype}, {grad.layout} and "
                    f"its strides are {grad.stride()}; a list must be contiguous and of one dtype, {tensors[0].dtype}"
                )
            if grad.device != control.tensor.device:
                raise ValueError(f"adamw_gradient_norm: a gradient is on {grad.device}, not {control.tensor.device}")
    adamw_gradient_norm_at(
        [[grad.data_ptr() for grad in tensors] for tensors in grads],
        [[grad.numel() for grad in tensors] for tensors in grads],
        [tensors[0].dtype if tensors else torch.float32 for tensors in grads],
        control,
        max_norm=max_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def adamw_gradient_norm_at(
    grads: Sequence[Sequence[int]],
    numels: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    control: AdamWControl,
    *,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`adamw_gradient_norm` for a caller that has checked the gradients.

    Args:
        grads: addresses of the gradients, list by list.
        numels: their sizes.
        dtypes: of each list.
        control: as for `adamw_gradient_norm`.
        max_norm: as for `adamw_gradient_norm`.
        grad_scale: as for `adamw_gradient_norm`.
        found_inf: as for `adamw_gradient_norm`.
    """
    native.call(
        "adamw_norm",
        control.tensor,
        grads,
        numels,
        [native.dtype_number("adamw_gradient_norm", dtype) for dtype in dtypes],
        control.tensor.data_ptr(),
        control.sums.data_ptr(),
        math.inf if max_norm is None else max_norm,
        native.address(grad_scale),
        native.address(found_inf),
    )


def _check_grads(grads: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(grads) != len(params):
        raise ValueError(f"adamw: got {len(grads)} gradients for {len(params)} tensors")
    dtype, device = grads[0].dtype, params[0].device
    for grad, param in zip(grads, params, strict=True):
        if grad.dtype != dtype or grad.device != device or grad.numel() != param.numel() or not grad.is_contiguous():
            raise ValueError(
                f"adamw: a parameter of shape {tuple(param.shape)} has a gradient of shape {tuple(grad.shape)}, "
                f"{grad.dtype} on {grad.device}, {grad.layout} with strides {grad.stride()}; a list needs contiguous "
                f"gradients of the parameters' sizes, all {dtype} on {device}"
            )


def _native_list(
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    absmaxes: Sequence[Tensor] | None,
    absmax_sqs: Sequence[Tensor] | None,
    offsets: Sequence[int] | None,
    numbers: Sequence[int] | None,
    advance: Sequence[bool] | None,
) -> tuple[Any, bool]:
    count = len(params)
    given = {
        "steps": steps,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "absmaxes": absmaxes,
        "absmax_sqs": absmax_sqs,
        "offsets": offsets,
        "numbers": numbers,
        "advance": advance,
    }
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise ValueError(f"adamw: got {count} params but {len(values)} {name}")
    eight_bit = count > 0 and exp_avgs[0].dtype == torch.uint8
    if eight_bit != (absmaxes is not None) or eight_bit != (absmax_sqs is not None):
        raise ValueError("adamw: uint8 moments need absmaxes and absmax_sqs, and float32 moments have none")
    offsets = [0] * count if offsets is None else offsets
    for i in range(count):
        _check_row(i, params, steps, exp_avgs, exp_avg_sqs, absmaxes, absmax_sqs, offsets[i], eight_bit)
    # Rows of one step count are one tensor to the native core.
    tensors: dict[int, int] = {}
    places = [tensors.setdefault(step.data_ptr(), len(tensors)) for step in steps]
    numbers_of, advance_of = [0] * len(tensors), [False] * len(tensors)
    for i, place in enumerate(places):
        numbers_of[place] = 0 if numbers is None else numbers[i]
        advance_of[place] |= advance is None or advance[i]
    made = native.adamw_list(
        [p.data_ptr() + offset * p.element_size() for p, offset in zip(params, offsets, strict=True)],
        [moment.data_ptr() for moment in exp_avgs],
        [moment.data_ptr() for moment in exp_avg_sqs],
        [0] * count if absmaxes is None else [absmax.data_ptr() for absmax in absmaxes],
        [0] * count if absmax_sqs is None else [absmax.data_ptr() for absmax in absmax_sqs],
        [moment.numel() for moment in exp_avgs],
        list(offsets),
        places,
        list(tensors),
        numbers_of,
        [int(counted) for counted in advance_of],
        native.dtype_number("adamw", params[0].dtype) if count else 0,
        eight_bit,
    )
    return made, eight_bit


def _check_row(
    i: int,
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    absmaxes: Sequence[Tensor] | None,
    absmax_sqs: Sequence[Tensor] | None,
    offset: int,
    eight_bit: bool,
) -> None:
    param, first, second = params[i], exp_avgs[i], exp_avg_sqs[i]
    what = f"adamw: a parameter of shape {tuple(param.shape)}"
    if not (param.is_contiguous() and first.is_contiguous() and second.is_contiguous()):
        raise ValueError(f"{what}, or a moment of it, is not contiguous")
    if param.dtype != params[0].dtype or param.device != params[0].device:
        raise ValueError(
            f"{what} is {param.dtype} on {param.device}; the list is {params[0].dtype} on {params[0].device}"
        )
    wanted = torch.uint8 if eight_bit else torch.float32
    if first.dtype != wanted or second.dtype != wanted:
        raise ValueError(f"{what} has moments that are {first.dtype} and {second.dtype}; they must be {wanted}")
    if first.numel() != second.numel() or offset < 0 or offset + first.numel() > param.numel():
        raise ValueError(
            f"{what} has moments of shapes {tuple(first.shape)} and {tuple(second.shape)} from its element {offset} on"
        )
    if steps[i].dtype != torch.float32 or steps[i].numel() != 1 or steps[i].device != param.device:
        raise ValueError(
            f"{what} has a step count that is {steps[i].dtype} on {steps[i].device}; it must be one float32"
        )
    if eight_bit:
        if offset % BLOCK != 0:
            raise ValueError(f"{what} has a piece from element {offset} on; 8-bit state is cut at multiples of {BLOCK}")
        blocks = -(-first.numel() // BLOCK)
        assert absmaxes is not None and absmax_sqs is not None
        for absmax in (absmaxes[i], absmax_sqs[i]):
            if absmax.dtype != torch.float32 or absmax.numel() != blocks or not absmax.is_contiguous():
                raise ValueError(
                    f"{what} has scales of shape {tuple(absmax.shape)}, {absmax.dtype}; {first.numel()} elements need "
                    f"{blocks} float32 in a row"
                )


# --- the functional op -----------------------------------------------------------------------------------------------


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
) -> None:
    if not params:
        return
    taken = torch.full((), float(step - 1), dtype=torch.float32, device=params[0].device)
    AdamWList(params, [taken] * len(params), exp_avgs, exp_avg_sqs).step(
        grads,
        AdamWControl(params[0].device),
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )


def _adamw_fake(params: list[Tensor], *rest: object) -> None:
    return None


native.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step, bool maximize) -> ()",
    _adamw,
    _adamw_fake,
)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
) -> None:
    """Update parameters and moments in place by one AdamW step: :class:`AdamWList` for a single use.

    Args:
        params: contiguous tensors of one dtype (float32, float16 or bfloat16) on one device.
        grads: gradients of the same shapes, contiguous, of one dtype.
        exp_avgs: first moments, float32, of the same sizes.
        exp_avg_sqs: second moments, float32, of the same sizes.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by ``lr``.
        step: number of this step, from 1.
        maximize: ascend instead of descend.
    Raises:
        ValueError: lists of different lengths, tensors that are not contiguous, or mixed dtypes or devices.
    Source:
        Decoupled weight decay regularization, arXiv 1711.05101, algorithm 2.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError("adamw_: params, grads, exp_avgs and exp_avg_sqs must have the same length")
    if step < 1:
        raise ValueError(f"adamw: step is {step}; the first step is 1")
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if not param.numel() == grad.numel() == exp_avg.numel() == exp_avg_sq.numel():
            raise ValueError(
                f"adamw_: a parameter of shape {tuple(param.shape)} has a gradient of shape {tuple(grad.shape)} and "
                f"moments of shapes {tuple(exp_avg.shape)} and {tuple(exp_avg_sq.shape)}"
            )
        if exp_avg.dtype != torch.float32 or exp_avg_sq.dtype != torch.float32:
            raise ValueError(f"adamw_: moments are {exp_avg.dtype} and {exp_avg_sq.dtype}; they must be float32")
    torch.ops.fastpeft.adamw_(params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, step, maximize)
