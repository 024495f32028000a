"""Hidden states of a batch: those of its text, whatever an adapter puts before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastpeft import PromptTuningConfig, get_peft_model
from fastpeft.data import PreferenceCollator
from fastpeft.trainers.forward import batch_hidden, hidden_states

VIRTUAL = 3
ITEMS: list[dict[str, Any]] = [
    {"prompt_ids": [1, 2, 3], "completions": [[4, 5], [6, 7, 8]], "pairs": [(0, 1)], "margins": None},
    {"prompt_ids": [9, 2], "completions": [[4], [6, 7, 8, 11]], "pairs": [(0, 1)], "margins": None},
]


class WithoutChoice(LlamaForCausalLM):
    """A model that gives logits everywhere, as older ones do: it has no ``logits_to_keep``."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs
    ):  # type: ignore[no-untyped-def,override]
        return super().forward(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, labels=labels, **kwargs
        )


def tuned(kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return get_peft_model(kind(config), PromptTuningConfig(num_virtual_tokens=VIRTUAL)).eval()


@torch.no_grad()
def alone(model: nn.Module, text: list[int]) -> torch.Tensor:
    return hidden_states(model, input_ids=torch.tensor([text]))[0]


@pytest.mark.parametrize("kind", [LlamaForCausalLM, WithoutChoice])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@torch.no_grad()
def test_every_answer_is_read_behind_its_prompt(kind: type[LlamaForCausalLM], layout: Any) -> None:
    """Places of a batch count tokens of text; hidden states that hold virtual ones too would be read elsewhere."""
    model = tuned(kind)
    batch = PreferenceCollator(0, layout, pad_to_multiple_of=1)(ITEMS)
    found = batch_hidden(model, batch)
    assert len(found) == batch["input_ids"].numel()
    texts = [item["prompt_ids"] + answer for item in ITEMS for answer in item["completions"]]
    ends = torch.stack([alone(tuned(), text)[-1] for text in texts])
    torch.testing.assert_close(found[batch["ends"]], ends, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_packed_rows() -> None:
    """Regression: of more than one packed row, logits were those of the text, hidden states of virtual tokens too."""
    model = tuned()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 4, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    found = hidden_states(model, input_ids=ids, position_ids=positions)
    assert found.shape == (2, 6, 32)
    for row, cut in ((0, 3), (1, 2)):
        expected = torch.cat([alone(model, part) for part in (ids[row, :cut].tolist(), ids[row, cut:].tolist())])
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
