"""Every variant of every method in every family, dense and NF4: trains, is saved, loaded, resumed and merged.

`test_every_method` looks closer at Llama; here are the others, with layers of their own: Qwen 3's norms of q and k,
Gemma 3's after sublayers, GPT-2's transposed and fused Conv1D, Mixtral's experts, which are packed as one layer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.families import FAMILIES, METHODS, NO_MERGE, logits, tiny, tokens, train
from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods import AdapterConfig, FullConfig, LoraConfig, PeftModel, get_peft_model
from fastpeft.models import quantize

MERGED = {"rtol": 1e-4, "atol": 1e-4}  # fp32, another order of sums, after steps of 1e-2
OTHERS = [family for family in FAMILIES if family != "llama"]
LOFTQ = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq")
CASES = [(name, family, base) for name in METHODS for family in OTHERS for base in ("dense", "nf4")]


def check(
    config: AdapterConfig, begin: nn.Module, base: nn.Module, again: nn.Module, folder: Path, merges: bool
) -> None:
    """Train from ``begin``; what is saved belongs to ``base`` and to ``again``."""
    torch.manual_seed(2)
    model, ids = get_peft_model(begin, config), tokens()
    assert isinstance(model, PeftModel)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    expected = logits(model, ids)
    model.save_pretrained(folder)
    losses = train(model, ids, seed=4)
    loaded = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(loaded, ids), expected)
    assert train(PeftModel.from_pretrained(again, folder, is_trainable=True), ids, seed=4) == losses
    if merges:
        torch.testing.assert_close(logits(loaded.merge_and_unload(), ids), expected, **MERGED)


@pytest.mark.parametrize(("name", "family", "base"), CASES)
def test_trains_saves_loads_goes_on_and_merges(name: str, family: str, base: str, tmp_path: Path) -> None:
    models = [quantize(tiny(family)) if base == "nf4" else tiny(family) for _ in range(3)]
    check(METHODS[name], *models, tmp_path, not name.startswith(NO_MERGE))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_loftq(family: str, tmp_path: Path) -> None:
    """GPT-2's adapter was refused on the NF4 base it belongs to, as nothing there says any more that it was Conv1D.

    LoftQ packs what it adapts: a mixture's experts stay dense, and so they do in the base that its adapter belongs to.
    """
    skip = ["experts"] if family == "mixtral" else []
    check(LOFTQ, tiny(family), *(quantize(tiny(family), skip=skip) for _ in range(2)), tmp_path, True)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_weights(family: str, tmp_path: Path) -> None:
    model, ids = get_peft_model(tiny(family), FullConfig()), tokens()
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert torch.equal(logits(loaded, ids), expected)
    with pytest.raises(UserError, match=r"NF4|quantised"):
        get_peft_model(quantize(tiny(family)), FullConfig())
