"""LoraConfig: a LoRA adapter, in PEFT's spelling with PEFT's defaults."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastpeft.methods.config_base import AdapterConfig, is_number
from fastpeft.nn.lora_init import STARTS, begins_in_base, is_known_start

_BIAS_CHOICES = ("none", "all", "lora_only")


@dataclass
class LoraConfig(AdapterConfig):
    """A LoRA adapter: which layers, which rank and scale, how it starts.

    Trained are r (k + n) numbers for a linear layer of weight ``(n, k)`` or for each expert of a mixture, n more with
    DoRA, and r (v + d) for an embedding ``(v, d)``; with ``shared_a`` r k less for each layer but the first of a group.
    Their fp32 values are the extra memory, and 8 bytes each of AdamW's state; PiSSA and OLoRA keep 4 r (k + n) bytes of
    starting factors.

    Args:
        r: rank of the update.
        target_modules: names of the layers to adapt, each matching a whole name or its last parts ("q_proj",
            "self_attn.q_proj"); or one regular expression for the whole name; or "all-linear" for every linear layer
            but the output embedding. None takes PEFT's choice for the model family. Embeddings, the output embedding
            and GPT-2's Conv1D can be named too. An empty list, where ``target_parameters`` are given, adapts none.
        target_parameters: names of weights of a mixture's experts, a whole name or its last parts
            ("mlp.experts.gate_up_proj", "experts.down_proj"): each expert gets an A and a B.
        exclude_modules: names, or one regular expression, of layers to leave out of the above.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability of dropping an element of the low-rank path's input, in training.
        fan_in_fan_out: for layers that store their weight transposed; set by itself where they do.
        bias: which biases of the base to train too: "none", "all", or "lora_only" (of the adapted layers).
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        modules_to_save: names of modules of which a copy is trained whole and saved with the adapter ("lm_head").
        init_lora_weights: True (B zero), "gaussian" (A normal, B zero), False (A and B random), "pissa" or
            "pissa_niter_N" and "olora" (the weight's principal part; the base stays as it is, and files hold an update
            of rank 2 r that PEFT reads), or "loftq" (layers are quantised to NF4, the adapter begins with the error).
        layers_to_transform: adapt only these layers, counted from 0.
        layers_pattern: name of the module list that ``layers_to_transform`` counts in, where there are several.
        rank_pattern: other ranks for layers whose name ends in a key, which may be a regular expression.
        alpha_pattern: other values of ``lora_alpha`` in the same way.
        use_dora: train the length of each row of the weight too (of each column of an embedding's table).
        loftq_config: of "loftq": ``{"loftq_bits": 4, "loftq_iter": 1}``. After more than one turn the base is no longer
            the one that ``fastpeft.quantize`` gives, and must be saved with the adapter. Layers that are not adapted
            stay dense, a mixture's experts too: the base is what ``quantize`` gives with their names in ``skip``.
        shared_a: train one A for layers with the same input (q, k and v; gate and up), as NeMo's LoRA does. PEFT's
            files hold it once for each layer.
        task_type: "CAUSAL_LM", "SEQ_2_SEQ_LM" or "FEATURE_EXTRACTION"; kept for the file, without effect here.
        base_model_name_or_path: where the base came from; filled in when the adapter is saved.
        revision: the base's revision, kept for the file.
        inference_mode: attach the adapter frozen.
    Raises:
        UserError: a value is out of range, or asks for something this version does not do.
    Source:
        LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353; the keys are those of PEFT's
        ``LoraConfig``.
    """

    PEFT_TYPE: ClassVar[str] = "LORA"
    IGNORED: ClassVar[frozenset[str]] = AdapterConfig.IGNORED | {
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "alora_invocation_tokens": (None,),
        "arrow_config": (None,),
        "corda_config": (None,),
        "ensure_weight_tying": (False, None),
        "eva_config": (None,),
        "kasa_config": (None,),
        "layer_replication": (None, []),
        "lora_bias": (False, None),
        "lora_ga_config": (None,),
        "megatron_config": (None,),
        "monteclora_config": (None,),
        "trainable_token_indices": (None, []),
        "use_bdlora": (None, False),
        "use_qalora": (False, None),
        "velora_config": (None,),
    }
    OWN: ClassVar[tuple[str, ...]] = ("shared_a",)
    MEANING: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora")

    r: int = 8
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    loftq_config: dict[str, Any] = field(default_factory=dict)
    shared_a: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self._tidy(
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
        )
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        self.loftq_config = dict(self.loftq_config or {})
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        self._check_numbers()
        self._check_names()
        self._check_choices()

    def _check_numbers(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise self._complain(f"{name}={rank!r}; a rank must be a whole number of at least 1")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            if not is_number(alpha) or not alpha > 0:
                raise self._complain(f"{name}={alpha!r}; must be a number above 0 (it is divided by the rank)")
        self._check_probability("lora_dropout")

    def _check_names(self) -> None:
        self._check_module_names()
        for name in ("rank_pattern", "alpha_pattern"):
            for expression in getattr(self, name):
                self._check_expression(name, expression)
        layers = self.layers_to_transform
        if layers is not None:
            if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
                raise self._complain(
                    "layers_to_transform cannot go with a regular expression in target_modules; give "
                    "target_modules as a list, or say the layers in the expression"
                )
            numbers = layers if isinstance(layers, list) else [layers]
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers) or not numbers:
                raise self._complain(f"layers_to_transform={layers!r}; must be layer numbers, counted from 0")
        elif self.layers_pattern:
            raise self._complain("layers_pattern does nothing without layers_to_transform; give both")

    def _check_choices(self) -> None:
        self._check_choice("bias", _BIAS_CHOICES)
        if not is_known_start(self.init_lora_weights):
            raise self._complain(
                f"init_lora_weights={self.init_lora_weights!r}; this version has {STARTS}. An adapter that PEFT made "
                "with another start changes its base model too: let PEFT convert it first (save_pretrained with "
                "path_initial_model_for_weight_conversion) or merge it"
            )
        self._check_loftq()
        self._check_parameters()
        if self.shared_a and (begins_in_base(self.init_lora_weights) or self.init_lora_weights == "loftq"):
            raise self._complain(
                f"shared_a with init_lora_weights={self.init_lora_weights!r}, which gives each layer an A of its own; "
                "leave one of them out"
            )
        self._check_task_type()

    def _check_parameters(self) -> None:
        if not self.target_parameters:
            return
        others = {
            "lora_dropout": self.lora_dropout != 0,
            "use_dora": self.use_dora,
            "init_lora_weights": self._began_specially,
            "fan_in_fan_out": self.fan_in_fan_out,
            "layers_to_transform": self.layers_to_transform is not None,
        }
        for name in (name for name, given in others.items() if given):
            raise self._complain(
                f"target_parameters with {name}={getattr(self, name)!r}, which LoRA of experts does not have; leave "
                "one of them out"
            )

    def _check_loftq(self) -> None:
        if self.loftq_config and self.init_lora_weights != "loftq":
            raise self._complain(f"loftq_config={self.loftq_config!r} needs init_lora_weights='loftq'")
        unknown = sorted(set(self.loftq_config) - {"loftq_bits", "loftq_iter"})
        if unknown or self.loftq_config.get("loftq_bits", 4) != 4:
            raise self._complain(f"loftq_config={self.loftq_config!r}; this version has loftq_bits 4 and loftq_iter")
        turns = self.loftq_iterations
        if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
            raise self._complain(f"loftq_config: loftq_iter is {turns!r}; must be a whole number of at least 1")

    @property
    def loftq_iterations(self) -> int:
        """Turns of LoftQ."""
        turns: int = self.loftq_config.get("loftq_iter", 1)
        return turns

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys, under which it reads the adapter's file.

        An adapter that began in the base is saved as an update of rank 2 r (`fastpeft.nn.lora_init`), with an alpha
        that leaves its scale; and no start is to be made again by who loads it.
        """
        values = super().to_dict()
        if self._began_specially:
            values["init_lora_weights"], values["loftq_config"] = True, {}
        if begins_in_base(self.init_lora_weights):
            factor = 2**0.5 if self.use_rslora else 2
            values["r"], values["lora_alpha"] = 2 * self.r, factor * self.lora_alpha
            values["rank_pattern"] = {key: 2 * r for key, r in self.rank_pattern.items()}
            values["alpha_pattern"] = {key: factor * alpha for key, alpha in self.alpha_pattern.items()}
        return values

    def own_dict(self) -> dict[str, Any]:
        """What `to_dict` says otherwise or not at all."""
        names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "loftq_config")
        special = {name: getattr(self, name) for name in names} if self._began_specially else {}
        return {**super().own_dict(), **special}

    @property
    def _began_specially(self) -> bool:
        return begins_in_base(self.init_lora_weights) or self.init_lora_weights == "loftq"

    def rank_of(self, module_name: str) -> int:
        """Rank for one module: the first key of ``rank_pattern`` that matches the end of its name, else ``r``.

        Args:
            module_name: full name in the base model.
        """
        return next((r for key, r in self.rank_pattern.items() if _pattern_matches(key, module_name)), self.r)

    def alpha_of(self, module_name: str) -> float:
        """Alpha for one module, by ``alpha_pattern`` in the same way.

        Args:
            module_name: full name in the base model.
        """
        matching = (alpha for key, alpha in self.alpha_pattern.items() if _pattern_matches(key, module_name))
        return next(matching, self.lora_alpha)

    def scaling_of(self, module_name: str) -> float:
        """The factor of ``B @ A`` for one module: alpha / r, or alpha / sqrt(r) with ``use_rslora``.

        Args:
            module_name: full name in the base model.
        """
        r = self.rank_of(module_name)
        return self.alpha_of(module_name) / (math.sqrt(r) if self.use_rslora else r)


def _pattern_matches(pattern: str, module_name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module_name) is not None
