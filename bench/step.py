"""One stack's training step, in a process of its own: builds the model, runs steps, prints one line of JSON.

Stacks patch libraries, choose allocators and leave memory behind, so each has its process (``python -m bench.step
'{"stack": ...}'``), started by the suite ``train_step``. All train the same thing: a Llama of random weights, linear
layers in NF4 with double quantisation, LoRA on all seven projections with fp32 adapters, AdamW with fp32 state, bf16
compute, gradients clipped at norm 1.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import PeerMissing

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setup:
    """What is trained and how long.

    Attributes:
        stack: fastpeft, or a peer of `bench.peers.train_step`.
        device: cuda or cpu.
        layers: decoder layers.
        hidden: features of the residual stream.
        intermediate: features inside the MLP.
        heads: query heads.
        kv_heads: key and value heads.
        vocab: size of the vocabulary.
        experts: of a mixture, in the form of Qwen3-MoE; 0 for a Llama.
        chosen: experts of a token.
        expert_width: features inside an expert.
        adapts_experts: of fastpeft, adapters beside the experts too, not only in the attention.
        batch: sequences.
        tokens: of a sequence.
        rank: of the adapters.
        dropout: of the adapters.
        checkpointing: of fastpeft, as ``accelerate`` takes it; peers have gradient checkpointing.
        budget_gb: with "selective", what activations may take.
        attention: of fastpeft, which of torch's attention kernels come first: flash, cudnn, or auto for torch's order.
        steps: timed.
        warmup: steps before.
        profile: of fastpeft, print the share of time by kernel.
        seed: of weights and tokens.
    """

    stack: str = "fastpeft"
    device: str = "cuda"
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    experts: int = 0
    chosen: int = 8
    expert_width: int = 768
    adapts_experts: bool = False
    batch: int = 4
    tokens: int = 2048
    rank: int = 16
    dropout: float = 0.0
    checkpointing: str = "full"
    budget_gb: float | None = None
    attention: str = "auto"
    steps: int = 5
    warmup: int = 3
    profile: bool = False
    seed: int = 0

    @property
    def projections(self) -> list[str]:
        """Linear layers with adapters: all seven, of a mixture those of the attention."""
        return list(PROJECTIONS[:4] if self.experts else PROJECTIONS)

    def describe(self) -> str:
        """The model in words."""
        kind, inner = "Llama", str(self.intermediate)
        if self.experts:
            kind, inner = "Mixture", f"{self.chosen} of {self.experts} experts of {self.expert_width}"
        return f"{kind} of random weights, {self.layers} layers of {self.hidden}/{inner}, vocabulary {self.vocab}"

    def model_config(self) -> Any:
        """The model's configuration, for transformers."""
        from transformers import LlamaConfig, Qwen3MoeConfig

        sizes: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": max(8192, self.tokens),
            "attn_implementation": "sdpa",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 3,
        }
        if not self.experts:
            return LlamaConfig(**sizes, rope_theta=500000.0)
        return Qwen3MoeConfig(
            **sizes,
            head_dim=128 if self.hidden >= 1024 else self.hidden // self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.expert_width,
            norm_topk_prob=True,
        )


@dataclass(frozen=True)
class Stack:
    """A model that is ready to train.

    Attributes:
        model: called with ``input_ids`` and ``labels``; its answer has ``loss``.
        optimizer: over its trainable parameters.
        autocast: whether the forward runs under bf16 autocast.
        note: what a reader should know about this stack.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: bool
    note: str = ""


def fastpeft(setup: Setup) -> Stack:
    """fastpeft: NF4Linear, LoRALinear, fused blocks, its checkpointing and its AdamW."""
    from fastpeft.methods import LoraConfig, get_peft_model
    from fastpeft.models import accelerate, report
    from fastpeft.optim import AdamW

    base = empty_model(
        setup,
        lambda linear: random_nf4(linear.out_features, linear.in_features, setup),
        lambda experts: random_nf4_experts(experts, setup),
    )
    accelerate(base, checkpointing=setup.checkpointing, activation_budget_gb=setup.budget_gb)
    lora = LoraConfig(r=setup.rank, lora_alpha=32, lora_dropout=setup.dropout, target_modules=setup.projections)
    if setup.adapts_experts:
        lora.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(base, lora)
    model.train()
    budget = "" if setup.budget_gb is None else f" {setup.budget_gb:g} GB"
    return Stack(
        model,
        AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        autocast=False,
        note=f"checkpointing {setup.checkpointing}{budget}; " + str(report(base)).replace("\n", "; "),
    )


def empty_model(
    setup: Setup,
    make: Callable[[nn.Linear], nn.Module],
    make_experts: Callable[[nn.Module], nn.Module] | None = None,
) -> Any:
    """A model in bf16 whose linear layers but the last are made one by one, so that it never stands there dense.

    Args:
        setup: the sizes.
        make: a linear layer from one on the meta device.
        make_experts: likewise a mixture's experts; without, they are dense.
    """
    from transformers import AutoModelForCausalLM

    config = setup.model_config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    torch.manual_seed(setup.seed)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and name != "lm_head":
            setattr(model.get_submodule(parent), child, make(module))
        elif child == "experts" and make_experts is not None:
            setattr(model.get_submodule(parent), child, make_experts(module))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=setup.device)
                value.fill_(1.0) if parameter.dim() == 1 else value.normal_(std=0.02)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(setup.device)
    model.config.use_cache = False
    return model


def word_tokenizer(setup: Setup) -> Any:
    """A tokenizer whose words are ``<t4>``, ``<t5>`` and so on: texts of known lengths over the whole vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<t{i}>": i for i in range(setup.vocab)}, unk_token="<t2>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"bos_token": "<t0>", "eos_token": "<t1>", "unk_token": "<t2>", "pad_token": "<t3>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **tokens)


def random_nf4(n: int, k: int, setup: Setup) -> nn.Module:
    """A 4-bit layer of random codes."""
    from fastpeft.nn import NF4Linear

    return NF4Linear(_random_codes((n, k), setup))


def random_nf4_experts(experts: nn.Module, setup: Setup) -> nn.Module:
    """A mixture's experts of random codes."""
    from fastpeft.nn import NF4Experts

    return NF4Experts(experts, **{name: _random_codes(p.shape, setup) for name, p in experts.named_parameters()})


def _random_codes(shape: Sequence[int], setup: Setup) -> Any:
    """Its scales are about 0.04, its weights of a standard deviation of about 0.02."""
    from fastpeft.ops import NF4Weight
    from fastpeft.ops.nf4_weight import dynamic_map

    device, numel = torch.device(setup.device), math.prod(shape)
    blocks = -(-numel // 64)
    return NF4Weight(
        torch.randint(256, (numel // 2, 1), dtype=torch.uint8, device=device),
        torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        torch.full((-(-blocks // 256),), 0.005, device=device),
        dynamic_map(device),
        torch.full((), 0.04, device=device),
        tuple(shape),
        64,
        torch.bfloat16,
    )


# --- measuring ---
def run(setup: Setup) -> dict[str, Any]:
    """Build a stack and time its steps.

    Args:
        setup: what to run.
    Returns:
        ``status`` ok with ``seconds`` of each step, ``peak_bytes``, ``base_bytes``, ``losses`` and ``note``; or
        ``not installed``, or ``failed`` with ``detail``.
    """
    from bench.peers import train_step as peers

    try:
        stack = (fastpeft if setup.stack == "fastpeft" else peers.STACKS[setup.stack])(setup)
        return {"status": "ok", "note": stack.note, **_measure(stack, setup)}
    except PeerMissing as missing:
        return {"status": str(missing), "detail": ""}
    except Exception as error:  # whatever a stack raises belongs in its row
        said = str(error).strip().splitlines()
        return {"status": "failed", "detail": f"{type(error).__name__}: {said[0] if said else ''}"}


def _measure(stack: Stack, setup: Setup) -> dict[str, Any]:
    cuda = setup.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)  # products this small are slower in two
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(setup.seed)
    ids = torch.randint(4, setup.vocab, (setup.batch, setup.tokens), generator=generator).to(setup.device)

    def step() -> Tensor:
        with torch.autocast(setup.device, torch.bfloat16, enabled=stack.autocast), _attention(setup):
            loss: Tensor = stack.model(input_ids=ids, labels=ids).loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        stack.optimizer.step()
        stack.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    base_bytes = torch.cuda.memory_allocated() if cuda else 0
    losses = [step() for _ in range(setup.warmup)]
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(setup.steps):
        start = time.perf_counter()
        losses.append(step())
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    result: dict[str, Any] = {
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "base_bytes": base_bytes,
        "losses": [float(loss) for loss in losses],
        "trainable": sum(p.numel() for p in parameters),
    }
    if setup.profile:
        result["kernels"] = _kernels(step, cuda)
        result["enqueue_seconds"] = _enqueue_seconds(step, cuda)
    return result


def _attention(setup: Setup) -> contextlib.AbstractContextManager[None]:
    """Torch's attention kernels in the order that was asked for."""
    if setup.attention == "auto" or setup.stack != "fastpeft":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if setup.attention == "cudnn":
        order.reverse()
    return sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def _kernels(step: Callable[[], Any], cuda: bool) -> list[dict[str, Any]]:
    """Time by kernel over one step, the greatest first; on a CPU by operator."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        step()
        if cuda:
            torch.cuda.synchronize()
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "us": event.self_device_time_total if cuda else event.self_cpu_time_total,
        }
        for event in recorded.key_averages()
    ]
    return sorted((row for row in rows if row["us"] > 0), key=lambda row: -row["us"])


def _enqueue_seconds(step: Callable[[], Any], cuda: bool) -> float:
    """What Python takes to enqueue a step, without waiting for the device."""
    start = time.perf_counter()
    step()
    spent = time.perf_counter() - start
    if cuda:
        torch.cuda.synchronize()
    return spent


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Libraries greet on stdout, where the result goes."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def median(seconds: list[float]) -> float:
    """The middle of several times."""
    return statistics.median(seconds)


if __name__ == "__main__":
    with stdout_to_stderr():
        outcome = run(Setup(**json.loads(sys.argv[1])))
    print(json.dumps({"setup": sys.argv[1], **outcome}))
