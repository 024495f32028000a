"""The suite must be red when an op is broken: each case breaks one on purpose and runs the tests that should notice."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpeft.methods.virtual import Layout
from fastpeft.nn import Adapted, BottleneckSite, LoRALinear
from fastpeft.ops import cross_entropy, linear_loss, lora, native, nf4
from fastpeft.ops.adamw import AdamWList
from fastpeft.optim import AdamW, base, formats

Patch = pytest.MonkeyPatch
Run = Callable[[], Any]


def running(module: str, name: str, *arguments: Any) -> Run:
    return lambda: getattr(importlib.import_module(module), name)(*arguments)


def swap_nibbles(patch: Patch) -> None:
    original = nf4._dequantize_range
    patch.setattr(nf4, "_dequantize_range", lambda codes, *rest: original(codes >> 4 | codes << 4, *rest))


def drop_the_tail(patch: Patch) -> None:
    original = nf4._dequantize_range

    def broken(*arguments: Any) -> None:
        *operands, begin, end, out = arguments
        out.zero_()
        original(*operands, begin, end - (end - begin) % 64, out)

    patch.setattr(nf4, "_dequantize_range", broken)


def forget_the_offset(patch: Patch) -> None:
    original = nf4._dequantize_range

    def broken(codes: Any, absmax: Any, nested: Any, nested_map: Any, offset: Any, *rest: Any) -> None:
        original(codes, absmax, nested, nested_map, None if offset is None else offset * 0, *rest)

    patch.setattr(nf4, "_dequantize_range", broken)


def change_an_adamw_option(**changed: Any) -> Callable[[Patch], None]:
    def sabotage(patch: Patch) -> None:
        original = AdamWList.step_at
        patch.setattr(AdamWList, "step_at", lambda *given, **options: original(*given, **{**options, **changed}))

    return sabotage


def begin_at_a_late_step(patch: Patch) -> None:
    original = AdamW._create_state

    def broken(self: AdamW, entries: Any) -> None:
        original(self, entries)
        for entry in entries:
            self.state[entry.param]["step"].fill_(1e7)

    patch.setattr(AdamW, "_create_state", broken)


def clip_by_another_norm(patch: Patch) -> None:
    original = base.adamw_gradient_norm_at
    patch.setattr(
        base, "adamw_gradient_norm_at", lambda *given, max_norm, **rest: original(*given, max_norm=2 * max_norm, **rest)
    )


def forget_the_scales(patch: Patch) -> None:
    original = formats.decode
    patch.setattr(formats, "decode", lambda codes, absmax, values: original(codes, torch.ones_like(absmax), values))


def change_a_list(index: int, change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """One of the arguments of a native list of tensors."""

    def sabotage(patch: Patch) -> None:
        original = native.adamw_list

        def broken(*arguments: Any) -> Any:
            changed = list(arguments)
            changed[index] = change(changed[index])
            return original(*changed)

        patch.setattr(native, "adamw_list", broken)

    return sabotage


shift_pieces = change_a_list(6, lambda offsets: [0] * len(offsets))
count_everywhere = change_a_list(10, lambda advances: [1] * len(advances))


def forget_the_base_gradient(patch: Patch) -> None:
    patch.setattr(lora, "_base_dx", lambda dy, member, k: dy.new_zeros((dy.shape[0], k)))


def draw_another_mask_in_backward(patch: Patch) -> None:
    calls: list[int] = []

    def broken(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
        if seed is None or p == 0.0:
            return x
        calls.append(1)
        return torch.ops.fastpeft.dropout(x, p, seed + len(calls))

    patch.setattr(lora, "_dropped", broken)


def project_by_the_first_layer(patch: Patch) -> None:
    original = lora._compose_backward

    def broken(dys: Any, x: torch.Tensor, xa: torch.Tensor, group: Any, *wanted: bool) -> Any:
        rank, count = group.padded_ranks[0], len(group.members)
        return original(dys, x, xa[:, :rank].repeat(1, count), group, *wanted)

    patch.setattr(lora, "_compose_backward", broken)


def forget_the_first_chunk(patch: Patch) -> None:
    original = linear_loss._add_product
    patch.setattr(linear_loss, "_add_product", lambda to, a, b, first: original(to, a, b, first=True))


def forget_the_divisor(patch: Patch) -> None:
    patch.setattr(cross_entropy, "_divisor", lambda *arguments: None)


def change_a_loss_option(**changed: Any) -> Callable[[Patch], None]:
    def sabotage(patch: Patch) -> None:
        original = cross_entropy._options
        patch.setattr(cross_entropy, "_options", lambda *arguments: original(*arguments)._replace(**changed))

    return sabotage


def change_an_argument(function: str, index: int, change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """One argument of a native call, by its place behind the tensor that says where."""

    def sabotage(patch: Patch) -> None:
        original = native.call

        def broken(called: str, where: torch.Tensor, *arguments: Any) -> None:
            changed = list(arguments)
            if called == function:
                changed[index] = change(changed[index])
            original(called, where, *changed)

        patch.setattr(native, "call", broken)

    return sabotage


def send_samples_to_the_next_row(patch: Patch) -> None:
    original = Adapted.routes

    def broken(self: Adapted, samples: int, device: torch.device) -> Any:
        for name, rows in original(self, samples, device):
            yield name, (rows + 1) % samples

    patch.setattr(Adapted, "routes", broken)


def put_virtual_tokens_behind(patch: Patch) -> None:
    def broken(cls: type[Layout], count: int, length: int, device: torch.device) -> Layout:
        places = torch.arange(count + length, device=device)[None]
        return cls(places[:, :length], places[:, length:], count)

    patch.setattr(Layout, "plain", classmethod(broken))


def read_the_output_beside_the_sublayer(patch: Patch) -> None:
    original = BottleneckSite._share
    patch.setattr(BottleneckSite, "_share", lambda self, name, x, h: original(self, name, h, h))


def keep_the_bases_lengths(patch: Patch) -> None:
    patch.setattr(LoRALinear, "_norms", lambda self, name: self.lora_magnitude_vector[name].base_squares.sqrt())


LINEAR = running("ops.test_nf4", "test_linear_forward_and_backward", torch.float32, 7, (100, 96), 64, "cpu")
BY_HAND = running("ops.test_nf4", "test_a_block_worked_out_by_hand")
BITS = running("ops.test_nf4", "test_bits_equal_bitsandbytes", torch.float32, 64, True, "cpu")
LORA = running("ops.test_lora", "test_forward_and_backward", torch.float32, 16, 0.3, "nf4", "cpu")
GROUP = running("ops.test_lora", "test_group", torch.float32, 16, 0.3, "nf4", "cpu")
NORM = running("ops.test_rms_norm", "test_forward_and_backward", torch.float32, (3, 40), "gemma", True, "cpu")
ROTARY = running("ops.test_rope", "test_forward_and_backward", torch.float32, (1, 4, 2, 5, 24, 16), True, "view", "cpu")
GATED = running("ops.test_glu", "test_forward_and_backward", torch.float32, "geglu-none", (3, 40), "cpu")
STEPS = running("optim.test_adamw", "test_a_thousand_steps_follow_torch", False, 10, "cpu")
CLIPPING = running("optim.test_gradient_norm", "test_clipping_is_that_of_torch", 1.0, "cpu")
BITS_OF_STATE = running("optim.test_state_dicts", "test_codes_of_another_map_are_read_by_it")
LISTS = running("ops.test_adamw", "test_steps_against_float64", "fp32", "fp32", 0, "float32", "cpu")
CODES = running("ops.test_adamw", "test_steps_against_float64", "bf16", "bf16", 0, "8bit", "cpu")
CLIPPED = running("ops.test_adamw", "test_norm_clipping_and_scale", "fp32", "cpu")
SKIPPED = running("ops.test_adamw", "test_a_skipped_step_writes_nothing", "found", "float32", "cpu")
ROUNDED = running("ops.test_adamw", "test_stochastic_rounding_is_unbiased_and_seeded", "cpu")
PIECES = running("ops.test_adamw", "test_pieces_have_the_bits_of_the_whole", "bf16", "8bit", "cpu")
BY_HAND_LOSS = running("ops.test_cross_entropy", "test_a_row_worked_out_by_hand", "cpu")
LOSS = running("ops.test_cross_entropy", "test_loss_and_gradients", torch.bfloat16, "t37-k64-v96", "mean", "all", "cpu")
CHUNKS = running("ops.test_cross_entropy", "test_chunks", torch.bfloat16, "mean", 64, "cpu")
MIXED = running("methods.test_several", "test_a_mixed_batch_gives_each_sample_its_adapter", "lora")
VIRTUAL = running("methods.test_prompts", "test_they_stand_before_the_text", "prompt", "llama")
BESIDE = running("nn.test_adapters", "test_a_site_adds_to_its_sublayer", (False, False), True, False, False)
LENGTHS = running("methods.test_several", "test_dora_under_autocast_has_the_lengths_of_fp32")

CASES: dict[str, tuple[Callable[[Patch], None], Run]] = {
    "swapped nibbles": (swap_nibbles, BY_HAND),
    "swapped nibbles, against bitsandbytes": (swap_nibbles, BITS),
    "dropped tail": (drop_the_tail, BITS),
    "forgotten offset": (forget_the_offset, BITS),
    "no bias correction": (begin_at_a_late_step, STEPS),
    "clipping at twice the norm": (clip_by_another_norm, CLIPPING),
    "no scales of 8-bit state": (forget_the_scales, BITS_OF_STATE),
    "no weight decay": (change_an_adamw_option(weight_decay=0.0), STEPS),
    "descent for ascent": (change_an_adamw_option(maximize=True), STEPS),
    "no eps in AdamW": (change_an_argument("adamw_step", 8, lambda eps: 1e-2), LISTS),
    "another beta1": (change_an_argument("adamw_step", 6, lambda beta1: 0.8), LISTS),
    "another beta2, 8-bit": (change_an_argument("adamw_step", 7, lambda beta2: 0.999), CODES),
    "descent for ascent in a list": (change_an_argument("adamw_step", 10, lambda maximize: True), LISTS),
    "rounding to nearest for stochastic": (change_an_argument("adamw_step", 11, lambda stochastic: False), ROUNDED),
    "no clipping": (change_an_argument("adamw_norm", 5, lambda max_norm: float("inf")), CLIPPED),
    "no unscaling": (change_an_argument("adamw_norm", 6, lambda scale: 0), CLIPPED),
    "an infinity overlooked": (change_an_argument("adamw_norm", 7, lambda found: 0), SKIPPED),
    "a piece at another place": (shift_pieces, PIECES),
    "a step counted by every list": (count_everywhere, PIECES),
    "no base gradient": (forget_the_base_gradient, LORA),
    "another mask in backward": (draw_another_mask_in_backward, LORA),
    "one layer's projection for all": (project_by_the_first_layer, GROUP),
    "chunks that do not add up": (forget_the_first_chunk, CHUNKS),
    "a sum for a mean": (forget_the_divisor, LOSS),
    "no label smoothing": (change_a_loss_option(label_smoothing=0.0), LOSS),
    "no softcap": (change_a_loss_option(softcap=0.0), LOSS),
    "ignored tokens that count": (change_a_loss_option(ignore_index=0), BY_HAND_LOSS),
    "no gradient past the norm": (change_an_argument("rms_norm_backward", 8, lambda dh: 0), NORM),
    "no offset of the norm's weight": (change_an_argument("rms_norm", 4, lambda offset: 0.0), NORM),
    "no eps in the norm": (change_an_argument("rms_norm", 11, lambda eps: 0.0), NORM),
    "turning on in backward": (change_an_argument("rope", -1, lambda backward: False), ROTARY),
    "the other approximation of GELU": (change_an_argument("glu", 3, lambda kind: 1), GATED),
    "a mixed batch with its samples moved": (send_samples_to_the_next_row, MIXED),
    "virtual tokens behind the text": (put_virtual_tokens_behind, VIRTUAL),
    "a parallel adapter that is not": (read_the_output_beside_the_sublayer, BESIDE),
    "DoRA with the base's lengths": (keep_the_bases_lengths, LENGTHS),
    "the slope of another gate": (change_an_argument("glu_backward", 3, lambda kind: 0), GATED),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_op_turns_the_suite_red(case: str, monkeypatch: Patch) -> None:
    sabotage, run = CASES[case]
    torch.manual_seed(1234)
    run()  # green first, or the red below would prove nothing
    sabotage(monkeypatch)
    torch.manual_seed(1234)
    with pytest.raises(AssertionError):
        run()
