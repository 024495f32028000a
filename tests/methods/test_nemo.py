"""Adapters under NeMo's names and in its order of rows give what their update gives in the weights themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods.families import logits, tiny, tokens, train
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods import PeftModel, load_nemo_adapter
from fastpeft.methods.nemo import split_qkv
from fastpeft.models import quantize

HEADS, GROUPS, SIZE, D, FF, R = 4, 2, 16, 64, 128, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROWS = {"qkv": (HEADS + 2 * GROUPS) * SIZE, "proj": D, "fc1": 2 * FF, "fc2": D}
INPUTS = {"qkv": D, "proj": D, "fc1": D, "fc2": FF}
NEMO_1 = {
    "qkv": "self_attention.adapter_layer.lora_kqv_adapter",
    "proj": "self_attention.adapter_layer.lora_dense_attention_adapter",
    "fc1": "mlp.adapter_layer.lora_hto4h_adapter",
    "fc2": "mlp.adapter_layer.lora_4htoh_adapter",
}
NEMO_2 = {
    "qkv": "self_attention.linear_qkv.adapter",
    "proj": "self_attention.linear_proj.adapter",
    "fc1": "mlp.linear_fc1.adapter",
    "fc2": "mlp.linear_fc2.adapter",
}


def random(*shape: int) -> Tensor:
    return 0.2 * torch.randn(shape)


def factors(layers: int = 2) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """A and B of every fused layer."""
    torch.manual_seed(3)
    return {(n, kind): (random(R, INPUTS[kind]), random(ROWS[kind], R)) for n in range(layers) for kind in ROWS}


def state(pairs: dict[tuple[int, str], tuple[Tensor, Tensor]], names: dict[str, str], before: str) -> dict[str, Tensor]:
    tensors = {}
    for (layer, kind), (a, b) in pairs.items():
        tensors[f"{before}layers.{layer}.{names[kind]}.linear_in.weight"] = a
        tensors[f"{before}layers.{layer}.{names[kind]}.linear_out.weight"] = b
    return tensors


def with_updates(pairs: dict[tuple[int, str], tuple[Tensor, Tensor]], scale: float) -> nn.Module:
    """The base with the updates added to its weights, row by row as Megatron's fused layers have them."""
    model: Any = tiny()
    with torch.no_grad():
        for (layer, kind), (a, b) in pairs.items():
            block, update = model.model.layers[layer], scale * (b @ a)
            if kind == "proj":
                block.self_attn.o_proj.weight += update
            elif kind == "fc2":
                block.mlp.down_proj.weight += update
            elif kind == "fc1":
                block.mlp.gate_proj.weight += update[:FF]
                block.mlp.up_proj.weight += update[FF:]
            else:
                row, attention, shared = 0, block.self_attn, HEADS // GROUPS
                for group in range(GROUPS):
                    for into, head in [
                        *((attention.q_proj, group * shared + i) for i in range(shared)),
                        *((attention.k_proj, group), (attention.v_proj, group)),
                    ]:
                        into.weight[head * SIZE : (head + 1) * SIZE] += update[row : row + SIZE]
                        row += SIZE
    return model.eval()


def written(tmp_path: Path, tensors: dict[str, Tensor], config: str | None = None) -> Path:
    tmp_path.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "adapter.safetensors")
    if config is not None:
        (tmp_path / "model_config.yaml").write_text(config)
    return tmp_path


def test_rows_of_qkv_by_hand() -> None:
    """Four query heads, two groups, heads of one row: rows q0 q1 k0 v0 q2 q3 k1 v1 hold 0 to 7."""
    q, k, v = split_qkv(torch.arange(8.0)[:, None], heads=4, groups=2, size=1)
    assert q.flatten().tolist() == [0, 1, 4, 5]
    assert k.flatten().tolist() == [2, 6]
    assert v.flatten().tolist() == [3, 7]


@pytest.mark.parametrize(
    ("names", "before"),
    [(NEMO_1, "model.language_model.encoder."), (NEMO_1, "model.decoder."), (NEMO_2, "module.decoder."), (NEMO_2, "")],
    ids=["nemo1", "nemo1-mcore", "nemo2", "nemo2-bare"],
)
def test_lora_is_its_update(names: dict[str, str], before: str, tmp_path: Path) -> None:
    pairs, ids = factors(), tokens()
    folder = written(tmp_path, state(pairs, names, before))
    model = load_nemo_adapter(tiny(), folder, alpha=8)
    expected = logits(with_updates(pairs, 8 / R), ids)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    assert not torch.allclose(expected, logits(tiny(), ids), atol=1e-2)
    config = model.peft_config["default"]
    assert (config.shared_a, config.r, config.lora_alpha, config.layers_to_transform) == (True, R, 8, None)

    model.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "peft")
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_stock_peft_reads_what_is_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pairs, ids = factors(), tokens()
    load_nemo_adapter(tiny(), written(tmp_path, state(pairs, NEMO_2, "")), alpha=8).save_pretrained(tmp_path / "peft")
    stock = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "peft"))
    torch.testing.assert_close(logits(stock, ids), logits(with_updates(pairs, 2.0), ids), **CLOSE)


def test_on_nf4_and_trained_further(tmp_path: Path) -> None:
    folder = written(tmp_path, state(factors(), NEMO_2, ""))
    model = load_nemo_adapter(quantize(tiny()), folder, alpha=8, is_trainable=True)
    losses = train(model, tokens())
    assert losses[-1] < losses[0]
    layer = model.get_base_model().model.layers[0].self_attn  # type: ignore[union-attr]
    assert layer.q_proj.lora_A["default"] is layer.v_proj.lora_A["default"]


def test_canonical_parts_and_chosen_layers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = "decoder.layers.1.self_attention.linear_qkv.adapter.adapter_"
    tensors = {}
    for part, rows in (("q", D), ("k", GROUPS * SIZE), ("v", GROUPS * SIZE)):
        tensors[f"{before}{part}.linear_in.weight"] = random(R, D)
        tensors[f"{before}{part}.linear_out.weight"] = random(rows, R)
    old = "decoder.layers.1.mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter.linear_"
    tensors |= {f"{old}in.weight": random(2, D), f"{old}out.weight": random(FF, 2)}
    model = load_nemo_adapter(tiny(), written(tmp_path, tensors), alpha=4)
    config = model.peft_config["default"]
    assert not config.shared_a and config.layers_to_transform == [1]
    dense: Any = tiny()
    with torch.no_grad():
        for part, layer in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
            a, b = (tensors[f"{before}{part}.linear_{side}.weight"] for side in ("in", "out"))
            getattr(dense.model.layers[1].self_attn, layer).weight += 4 / R * b @ a
        dense.model.layers[1].mlp.up_proj.weight += 4 / 2 * tensors[f"{old}out.weight"] @ tensors[f"{old}in.weight"]
    torch.testing.assert_close(logits(model, tokens()), logits(dense, tokens()), **CLOSE)


def test_layers_in_one_tensor(tmp_path: Path) -> None:
    """Distributed checkpoints hold ``layers.self_attention...`` with a first dimension of all layers."""
    pairs, stacked = factors(), {}
    for kind, name in NEMO_2.items():
        for side, place in (("in", 0), ("out", 1)):
            stacked[f"decoder.layers.{name}.linear_{side}.weight"] = torch.stack(
                [pairs[n, kind][place] for n in (0, 1)]
            )
    model = load_nemo_adapter(tiny(), written(tmp_path, stacked), alpha=R)
    torch.testing.assert_close(logits(model, tokens()), logits(with_updates(pairs, 1.0), tokens()), **CLOSE)


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("peft: {lora_tuning: {adapter_dim: 4, alpha: 12}}", 3.0),
        ("model: {peft: {lora_tuning: {adapter_dim: 4, alpha: '${.adapter_dim}'}}}", 1.0),
    ],
    ids=["alpha", "dim"],
)
def test_alpha_comes_from_the_configuration_beside_it(text: str, scale: float, tmp_path: Path) -> None:
    pairs = factors()
    model = load_nemo_adapter(tiny(), written(tmp_path, state(pairs, NEMO_1, "model."), text))
    torch.testing.assert_close(logits(model, tokens()), logits(with_updates(pairs, scale), tokens()), **CLOSE)


def hooked(model: Any, adapter: Callable[[int, str, Tensor, Tensor], Tensor]) -> nn.Module:
    """A model whose sublayers add what ``adapter`` gives of layer, place, input and output."""
    for number, layer in enumerate(model.model.layers):
        for place, sublayer in (("1", layer.self_attn), ("2", layer.mlp)):

            def after(module: Any, args: Any, kwargs: Any, out: Any, n: int = number, place: str = place) -> Any:
                x, h = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
                h = h + adapter(n, place, x, h)
                return (h, *out[1:]) if isinstance(out, tuple) else h

            sublayer.register_forward_hook(after, with_kwargs=True)
    return model


@pytest.mark.parametrize("position", ["pre", "post"])
def test_parallel_adapters(position: str, tmp_path: Path) -> None:
    torch.manual_seed(6)
    tensors = {}
    for layer in (0, 1):
        for place in "12":
            before = f"model.decoder.layers.{layer}.adapter_layer.adapter_{place}."
            tensors |= {f"{before}linear_in.weight": random(8, D), f"{before}linear_out.weight": random(D, 8)}
            tensors |= {f"{before}layer_norm.weight": 1 + random(D), f"{before}layer_norm.bias": random(D)}

    def adapter(layer: int, place: str, x: Tensor, h: Tensor) -> Tensor:
        before = f"model.decoder.layers.{layer}.adapter_layer.adapter_{place}."
        norm = [tensors[f"{before}layer_norm.{leaf}"] for leaf in ("weight", "bias")]
        y = F.layer_norm(x, (D,), *norm) if position == "pre" else x
        y = F.silu(y @ tensors[f"{before}linear_in.weight"].T) @ tensors[f"{before}linear_out.weight"].T
        return y if position == "pre" else F.layer_norm(y, (D,), *norm)

    config = f"peft: {{adapter_tuning: {{norm_position: {position}}}}}"
    model = load_nemo_adapter(tiny(), written(tmp_path, tensors, config))
    expected = logits(hooked(tiny(), adapter), tokens())
    torch.testing.assert_close(logits(model, tokens()), expected, **CLOSE)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_linear_adapters(position: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    norm, down, up = (0, 1, 3) if position == "pre" else (3, 0, 2)
    before = "model.layers.1.adapter_layer.adapter_2.module."
    tensors = {f"{before}{norm}.weight": 1 + random(D), f"{before}{norm}.bias": random(D)}
    tensors |= {f"{before}{down}.weight": random(8, D), f"{before}{up}.weight": random(D, 8)}

    def adapter(layer: int, place: str, x: Tensor, h: Tensor) -> Tensor:
        if (layer, place) != (1, "2"):
            return torch.zeros(())
        values = [tensors[f"{before}{norm}.{leaf}"] for leaf in ("weight", "bias")]
        y = F.layer_norm(h, (D,), *values) if position == "pre" else h
        y = F.silu(y @ tensors[f"{before}{down}.weight"].T) @ tensors[f"{before}{up}.weight"].T
        return y if position == "pre" else F.layer_norm(y, (D,), *values)

    model = load_nemo_adapter(tiny(), written(tmp_path, tensors))
    assert model.peft_config["default"].leave_out == [0]
    torch.testing.assert_close(logits(model, tokens()), logits(hooked(tiny(), adapter), tokens()), **CLOSE)


def test_p_tuning(tmp_path: Path) -> None:
    torch.manual_seed(8)
    before = "model.embedding.adapter_layer.ptuning_adapter."
    tensors = {f"{before}embedding.weight": random(5, 20), f"{before}inference_table": random(5, D)}
    tensors |= {f"{before}first.weight": random(24, 20), f"{before}first.bias": random(24)}
    tensors |= {f"{before}second.weight": random(D, 24), f"{before}second.bias": random(D)}
    virtual = F.gelu(
        tensors[f"{before}embedding.weight"] @ tensors[f"{before}first.weight"].T + tensors[f"{before}first.bias"]
    )
    virtual = virtual @ tensors[f"{before}second.weight"].T + tensors[f"{before}second.bias"]
    base, ids = tiny(), tokens()
    embedded = torch.cat((virtual.expand(2, -1, -1), base.get_input_embeddings()(ids)), 1)  # type: ignore[operator]
    with torch.no_grad():
        expected = base(inputs_embeds=embedded).logits[:, 5:]
    model = load_nemo_adapter(tiny(), written(tmp_path, tensors), is_trainable=True)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    losses = train(model, ids)
    assert losses[-1] < losses[0]


def test_mistakes(tmp_path: Path) -> None:
    pairs = factors()
    good = state(pairs, NEMO_1, "model.")
    model = tiny()
    before = copy.deepcopy(model.state_dict())

    def refuses(
        message: str, tensors: dict[str, Tensor] | None = None, base: nn.Module | None = None, **options: Any
    ) -> None:
        folder = tmp_path / "given"
        if tensors is not None:
            written(folder, tensors)
        with pytest.raises(UserError, match=message):
            load_nemo_adapter(model if base is None else base, folder, **options)

    refuses("there is no such file")
    for name in ("adapter.nemo", "mp_rank_00/model_weights.ckpt", "__0_0.distcp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x80")
        with pytest.raises(UserError, match=r"holds a pickle.*convert it once.*weights_only=True"):
            load_nemo_adapter(model, tmp_path / name)
    refuses("alpha is not in the file.*here 4", good)
    refuses("alpha is not in the file", good, alpha=0.0)
    refuses("1 names are not known, such as model.x", {**good, "model.x": random(2)}, alpha=8)
    refuses("names are not known, such as decoder.weight", {"decoder.weight": random(2)})
    refuses("has only one of linear_in and linear_out", dict(list(good.items())[1:]), alpha=8)
    wide = {key: random(160, R) if "kqv_adapter.linear_out" in key else t for key, t in good.items()}
    refuses("linear_qkv has 160 rows, and this model's 4 query heads and 2 key heads of 16 make 128", wide, alpha=8)
    refuses("GPT2LMHeadModel has no layers with self_attn.q_proj", good, tiny("gpt2"), alpha=8)
    broken = {key: t * torch.nan for key, t in good.items()}
    refuses("hold NaN or Inf", broken, alpha=8)
    refuses("ptuning_adapter needs", {"ptuning_adapter.embedding.weight": random(5, 20)})
    (tmp_path / "given" / "second.safetensors").write_bytes(b"")
    refuses("it holds adapter.safetensors, second.safetensors; give one", alpha=8)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
