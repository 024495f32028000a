"""Prompt tuning and P-tuning as methods: their configurations, and virtual tokens for a model."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.targets import AdapterPlan, outer_modules, plan_modules_to_save
from fastpeft.nn import PromptEncoder, Prompts, SoftPrompt

_SHAPE_KEYS = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


class PromptConfig(AdapterConfig):
    """What both kinds of virtual tokens have in common."""

    num_virtual_tokens: int
    token_dim: int | None
    modules_to_save: list[str] | None

    def _check_prompt(self) -> None:
        self._tidy("modules_to_save")
        self._check_whole("num_virtual_tokens")
        self._check_module_names()
        self._check_task_type()
        if getattr(self, "num_transformer_submodules", None) not in (None, 1):
            raise self._complain(
                "num_transformer_submodules=2 is for encoder-decoder models, which this version gives no virtual tokens"
            )


@dataclass
class PromptTuningConfig(PromptConfig):
    """Prompt tuning: virtual tokens before the text, trained as they are.

    Trained are v d numbers, v virtual tokens for a model of hidden size d; every sequence is v tokens longer, and
    counts so in length limits.

    Args:
        num_virtual_tokens: v.
        prompt_tuning_init: "RANDOM" (normal), "TEXT" (embeddings of a text, cut or repeated to v tokens) or
            "SAMPLE_VOCAB" (embeddings of random tokens).
        prompt_tuning_init_text: the text, for "TEXT".
        tokenizer_name_or_path: folder of its tokenizer, for "TEXT".
        tokenizer_kwargs: options to load that tokenizer with.
        token_dim: d; read off the model.
        num_transformer_submodules: 1; kept for the file, as the following.
        num_attention_heads: of the model.
        num_layers: of the model.
        modules_to_save: names of modules of which a copy is trained whole.
        task_type: as in LoraConfig.
        base_model_name_or_path: as in LoraConfig.
        revision: as in LoraConfig.
        inference_mode: attach the adapter frozen.
    Raises:
        UserError: a value is out of range or missing.
    Source:
        Prompt tuning, arXiv 2104.08691; the keys are those of PEFT's ``PromptTuningConfig``.
    """

    PEFT_TYPE: ClassVar[str] = "PROMPT_TUNING"

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self.prompt_tuning_init = str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)).upper()
        self._check_prompt()
        self._check_choice("prompt_tuning_init", ("RANDOM", "TEXT", "SAMPLE_VOCAB"))
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    raise self._complain(f"prompt_tuning_init='TEXT' needs {name}")

    def make(self, width: int, embeddings: nn.Module, from_file: bool) -> SoftPrompt:
        """Virtual tokens to begin with."""
        drawn = nn.Embedding(self.num_virtual_tokens, width).weight.detach()  # first in any case, as in PEFT
        if self.prompt_tuning_init == "RANDOM" or from_file:
            return SoftPrompt(drawn)
        weight: Tensor = embeddings.weight  # type: ignore[assignment]
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, weight.shape[0], (self.num_virtual_tokens,))
        else:
            ids = self._text_ids()
        with torch.no_grad():
            return SoftPrompt(embeddings(ids.to(weight.device)).detach().clone())

    def _text_ids(self) -> Tensor:
        """Tokens of the text, cut or repeated."""
        from transformers import AutoTokenizer

        path, options = str(self.tokenizer_name_or_path), dict(self.tokenizer_kwargs or {})
        options.pop("trust_remote_code", None)  # a file's text is not to decide what code runs
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=os.path.isdir(path), **options)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer_name_or_path: no tokenizer could be loaded from '{path}': {error}") from error
        ids: list[int] = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise UserError(f"prompt_tuning_init_text: {self.prompt_tuning_init_text!r} has no tokens")
        count = self.num_virtual_tokens
        return torch.tensor((ids * -(-count // len(ids)))[:count])


@dataclass
class PromptEncoderConfig(PromptConfig):
    """P-tuning: virtual tokens before the text, trained as the output of a small network.

    Trained numbers by kind of encoder stand in `fastpeft.nn.prompt`. Files hold the virtual tokens, as PEFT's do, and
    beside them the encoder (``prompt_encoder.safetensors``), so that training goes on from them exactly.

    Args:
        num_virtual_tokens: v.
        encoder_reparameterization_type: "MLP" or "LSTM", as in PEFT; "NEMO" for NeMo's bottleneck.
        encoder_hidden_size: width h of the encoder (NeMo's bottleneck_dim); None takes the model's (NeMo: 1024).
        encoder_num_layers: of the LSTM.
        encoder_dropout: between the layers of the LSTM.
        encoder_embedding_dim: width of the table before NeMo's bottleneck; None for 1024.
        token_dim: as in PromptTuningConfig.
        num_transformer_submodules: as in PromptTuningConfig.
        num_attention_heads: as in PromptTuningConfig.
        num_layers: as in PromptTuningConfig.
        modules_to_save: names of modules of which a copy is trained whole.
        task_type: as in LoraConfig.
        base_model_name_or_path: as in LoraConfig.
        revision: as in LoraConfig.
        inference_mode: attach the adapter frozen.
    Raises:
        UserError: a value is out of range.
    Source:
        P-tuning, arXiv 2103.10385; the keys are those of PEFT's ``PromptEncoderConfig``.
    """

    PEFT_TYPE: ClassVar[str] = "P_TUNING"
    OWN: ClassVar[tuple[str, ...]] = ("encoder_embedding_dim",)

    num_virtual_tokens: int = 20
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    encoder_embedding_dim: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        kind = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = str(getattr(kind, "value", kind)).upper()
        self._check_prompt()
        self._check_choice("encoder_reparameterization_type", ("MLP", "LSTM", "NEMO"))
        self._check_whole("encoder_num_layers")
        for name in ("encoder_hidden_size", "encoder_embedding_dim"):
            if getattr(self, name) is not None:
                self._check_whole(name)
        self._check_probability("encoder_dropout")

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys; it reads the virtual tokens alone, and knows no NeMo encoder."""
        values = super().to_dict()
        if self.encoder_reparameterization_type == "NEMO":
            values["encoder_reparameterization_type"] = "MLP"
        return values

    def own_dict(self) -> dict[str, Any]:
        """NeMo's kind and width."""
        if self.encoder_reparameterization_type != "NEMO":
            return {}
        return {**super().own_dict(), "encoder_reparameterization_type": "NEMO"}

    def make(self, width: int, embeddings: nn.Module, from_file: bool) -> PromptEncoder:
        """An encoder to begin with."""
        is_nemo = self.encoder_reparameterization_type == "NEMO"
        return PromptEncoder(
            self.num_virtual_tokens,
            width,
            self.encoder_reparameterization_type,
            self.encoder_hidden_size or (1024 if is_nemo else width),
            self.encoder_num_layers,
            self.encoder_dropout,
            (self.encoder_embedding_dim or 1024) if is_nemo else None,
        )


class PromptMethod:
    """Virtual tokens of either kind."""

    def plan(self, model: nn.Module, config: PromptTuningConfig | PromptEncoderConfig, every_name: bool) -> AdapterPlan:
        """Read sizes off the model."""
        width = _embeddings(model).weight.shape[1]
        if config.token_dim not in (None, width):
            raise UserError(
                f"token_dim: the virtual tokens are {config.token_dim} numbers wide and this model's are {width}; they "
                "belong to another base model"
                + (f": '{config.base_model_name_or_path}'" if config.base_model_name_or_path else "")
            )
        whole: Any = getattr(model, "config", None)
        text = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
        found = {
            "token_dim": width,
            "num_transformer_submodules": 1,
            "num_attention_heads": getattr(text, "num_attention_heads", None),
            "num_layers": getattr(text, "num_hidden_layers", None),
        }
        given = {key: getattr(config, key) for key in _SHAPE_KEYS}
        filled = {key: found[key] if value is None else value for key, value in given.items()}
        if isinstance(config, PromptEncoderConfig) and config.encoder_hidden_size is None:
            is_nemo = config.encoder_reparameterization_type == "NEMO"
            filled["encoder_hidden_size"] = 1024 if is_nemo else width
        saved = plan_modules_to_save(dict(outer_modules(model)), config)
        return AdapterPlan(dataclasses.replace(config, **filled), (), tuple(saved))

    def inject(self, host: nn.Module, model: nn.Module, plan: AdapterPlan, adapter_name: str, undo: ExitStack) -> None:
        """Make the virtual tokens; they belong to the wrapper, not to a layer."""
        embeddings = _embeddings(model)
        if not getattr(host, "takes_prompts", False):
            raise UserError(
                f"{type(model).__name__}: virtual tokens are for causal language models, whose forward takes input_ids "
                "and labels; use LoraConfig or IA3Config for this one"
            )
        if embeddings.weight.is_meta:
            raise UserError("the embeddings are on the meta device (not loaded, or offloaded); load the model whole")
        prompts = host._modules.get("prompt_encoder")
        if not isinstance(prompts, Prompts):
            prompts = Prompts()
            host.add_module("prompt_encoder", prompts)
            undo.callback(lambda: host._modules.pop("prompt_encoder"))
        prompt = plan.config.make(embeddings.weight.shape[1], embeddings, plan.from_file).to(embeddings.weight.device)
        prompts.add_adapter(adapter_name, prompt.train(host.training))
        undo.callback(prompts.delete_adapter, adapter_name)


def _embeddings(model: nn.Module) -> Any:
    get = getattr(model, "get_input_embeddings", None)
    found = get() if callable(get) else None
    if found is None or getattr(model.config, "is_encoder_decoder", False):  # type: ignore[union-attr]
        raise UserError(
            f"{type(model).__name__}: virtual tokens need a decoder with token embeddings (a causal language model); "
            "use LoraConfig or IA3Config for this one"
        )
    return found
