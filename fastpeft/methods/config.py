"""LoraConfig: what to adapt and how, in PEFT's spelling with PEFT's defaults.

The same names serve Python, YAML and ``adapter_config.json``. PEFT's file has some twenty further keys; the tables at
the top say which of them carry no meaning here and which stand for something this version cannot do. The latter are
accepted at their neutral value and refused at any other, because ignoring them would change the model's output.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpeft.errors import UserError, did_you_mean

# Keys of adapter_config.json that say nothing about the adapter's mathematics.
_IGNORED_KEYS = frozenset(
    {"auto_mapping", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "runtime_config"}
)

# PEFT options that this version does not have, with the values that switch them off.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    "eva_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "loftq_config": (None, {}),
    "lora_bias": (False, None),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}

_BIAS_CHOICES = ("none", "all", "lora_only")
_TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
_HEAD_TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT adds the task's head to modules_to_save


@dataclass
class LoraConfig:
    """A LoRA adapter: which layers, which rank and scale, how it starts.

    Args:
        r: rank of the update.
        target_modules: names of the linear layers to adapt, each matching a whole name or its last parts ("q_proj",
            "self_attn.q_proj"); or one regular expression for the whole name; or "all-linear" for every linear layer
            but the output embedding. None takes PEFT's choice for the model family.
        exclude_modules: names, or one regular expression, of layers to leave out of the above.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability of dropping an element of the low-rank path's input, in training.
        fan_in_fan_out: for layers that store their weight transposed; such layers are not supported yet.
        bias: which biases of the base to train too: "none", "all", or "lora_only" (of the adapted layers).
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        modules_to_save: names of modules of which a copy is trained whole and saved with the adapter ("lm_head").
        init_lora_weights: True (B zero), "gaussian" (A normal, B zero), False (A and B random).
        layers_to_transform: adapt only these layers, counted from 0.
        layers_pattern: name of the module list that ``layers_to_transform`` counts in, where there are several.
        rank_pattern: other ranks for layers whose name ends in a key, which may be a regular expression.
        alpha_pattern: other values of ``lora_alpha`` in the same way.
        use_dora: not supported yet.
        task_type: "CAUSAL_LM", "SEQ_2_SEQ_LM" or "FEATURE_EXTRACTION"; kept for the file, without effect here.
        base_model_name_or_path: where the base came from; filled in when the adapter is saved.
        revision: the base's revision, kept for the file.
        inference_mode: attach the adapter frozen.
    Raises:
        UserError: a value is out of range, or asks for something this version does not do.
    Source:
        LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; the keys are those of PEFT's ``LoraConfig``.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
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
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = _as_list(getattr(self, name))
            setattr(self, name, None if value == [] and name != "target_modules" else value)
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        if self.task_type is not None:
            self.task_type = str(getattr(self.task_type, "value", self.task_type))
        self._check_numbers()
        self._check_names()
        self._check_unsupported()

    def _check_numbers(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise UserError(f"LoraConfig: {name}={rank!r}; a rank must be a whole number of at least 1")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            if not _is_number(alpha) or not alpha > 0:
                raise UserError(f"LoraConfig: {name}={alpha!r}; must be a number above 0 (it is divided by the rank)")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"LoraConfig: lora_dropout={self.lora_dropout!r}; must be a probability, at least 0 and below 1"
            )

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, list) and not all(isinstance(entry, str) and entry for entry in value):
                raise UserError(f"LoraConfig: {name}={value!r}; must be a list of module names")
        if self.target_modules in ([], ""):
            raise UserError("LoraConfig: target_modules is empty; name some linear layers, or use 'all-linear'")
        if isinstance(self.modules_to_save, str):
            raise UserError(
                f"LoraConfig: modules_to_save={self.modules_to_save!r}; must be a list, ['{self.modules_to_save}']"
            )
        patterns = {"rank_pattern": list(self.rank_pattern), "alpha_pattern": list(self.alpha_pattern)}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                patterns[name] = [value]
        for name, expressions in patterns.items():
            for expression in expressions:
                try:
                    re.compile(expression)
                except re.error as error:
                    raise UserError(
                        f"LoraConfig: {name}: {expression!r} is not a regular expression: {error}"
                    ) from error
        layers = self.layers_to_transform
        if layers is not None:
            if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
                raise UserError(
                    "LoraConfig: layers_to_transform cannot go with a regular expression in target_modules; give "
                    "target_modules as a list, or say the layers in the expression"
                )
            numbers = layers if isinstance(layers, list) else [layers]
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers) or not numbers:
                raise UserError(f"LoraConfig: layers_to_transform={layers!r}; must be layer numbers, counted from 0")
        elif self.layers_pattern:
            raise UserError("LoraConfig: layers_pattern does nothing without layers_to_transform; give both")

    def _check_unsupported(self) -> None:
        if self.bias not in _BIAS_CHOICES:
            raise UserError(f"LoraConfig: bias={self.bias!r}; must be one of {', '.join(map(repr, _BIAS_CHOICES))}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UserError(
                f"LoraConfig: init_lora_weights={self.init_lora_weights!r}; this version has True, False and "
                "'gaussian'. An adapter that PEFT made with another start changes its base model too: let PEFT convert "
                "it first (save_pretrained with path_initial_model_for_weight_conversion) or merge it"
            )
        if self.use_dora:
            raise UserError("LoraConfig: use_dora=True; DoRA is not in this version, leave it out or use use_rslora")
        if self.fan_in_fan_out:
            raise UserError(
                "LoraConfig: fan_in_fan_out=True; it is for layers with transposed weights (GPT-2's Conv1D), which "
                "this version cannot adapt; leave it out for torch.nn.Linear"
            )
        if self.task_type in _HEAD_TASK_TYPES:
            raise UserError(
                f"LoraConfig: task_type={self.task_type!r} trains a task head, which this version does not add by "
                "itself; leave task_type out and name the head in modules_to_save, for example ['score']"
            )
        if self.task_type is not None and self.task_type not in _TASK_TYPES:
            hint = did_you_mean(self.task_type.upper(), _TASK_TYPES)
            raise UserError(f"LoraConfig: task_type={self.task_type!r}; must be one of {', '.join(_TASK_TYPES)}{hint}")

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

    def to_dict(self) -> dict[str, Any]:
        """The configuration under PEFT's keys, as ``adapter_config.json`` holds it."""
        return {"peft_type": "LORA", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "LoraConfig") -> LoraConfig:
        """Read a configuration from PEFT's keys.

        Args:
            values: the content of ``adapter_config.json``, or the same keys from elsewhere.
            where: what error messages call the source, for example the file's path.
        Returns:
            The configuration; keys that carry no meaning here are dropped.
        Raises:
            UserError: a key is unknown, or its value asks for something this version does not do.
        """
        peft_type = values.get("peft_type", "LORA")
        peft_type = str(getattr(peft_type, "value", peft_type))
        if peft_type.upper() != "LORA":
            raise UserError(f"{where}: peft_type is '{peft_type}'; this version reads and trains 'LORA' only")
        known = [f.name for f in dataclasses.fields(cls)]
        kept = {}
        for key, value in values.items():
            if key in known:
                kept[key] = value
            elif key in _NEUTRAL_VALUES:
                if value not in _NEUTRAL_VALUES[key]:
                    raise UserError(
                        f"{where}: {key}={value!r} is a PEFT option that this version does not have, and leaving it "
                        f"out would change the result; remove the key if it was not meant, or use PEFT for this adapter"
                    )
            elif key not in _IGNORED_KEYS:
                near = difflib.get_close_matches(str(key), [*known, *_NEUTRAL_VALUES], n=2)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys: {', '.join(known)}"
                raise UserError(f"{where}: unknown key {key!r}; {hint}")
        try:
            return cls(**kept)
        except UserError as error:
            raise UserError(str(error).replace("LoraConfig", where, 1)) from error


def _as_list(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) or _is_list_like(value) else value


def _is_list_like(value: Any) -> bool:
    return not isinstance(value, (str, Mapping)) and hasattr(value, "__iter__")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pattern_matches(pattern: str, module_name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module_name) is not None
